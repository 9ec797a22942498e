"""Patch one layer: its update, the operator that V gives, the new update and the report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol, runtime_checkable

from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import LayerReport
from stayaligned.defenses import ModelPair
from stayaligned.weights.unsupported import list_names

if TYPE_CHECKING:
    from stayaligned.algorithms.alignment_delta import AlignmentDelta, AlignmentSubspace
    from stayaligned.algorithms.safe_lora import Operator, Update


@dataclass(frozen=True, slots=True, eq=False)
class ProjectedLayer:
    """One layer's update and its projection; valid while the layer's V is in memory."""

    name: str
    """The layer's name, as `LoraLayer.name`."""
    delta: AlignmentDelta
    """V = W_aligned - W_base, (out, in)."""
    operator: Operator
    """The operator that V gives."""
    before: Update
    """The update before the patch: factors of a LoRA, or W_ft - W_aligned as a matrix (out, in)."""
    projected: Update
    """`operator(before)`."""


@dataclass(frozen=True, slots=True, eq=False)
class LayerPatch:
    """The update that a layer gets if it is selected."""

    update: Update
    """The new update, in the form of the old one: factors or a matrix."""
    subspace: AlignmentSubspace | None
    """The directions that the new update was computed from; None if it needs none."""


_NOTHING = 1e-5
"""Share of an update below which nothing is left but rounding error."""

NO_DIRECTION = frozenset({"no_direction", "rounded_direction"})
"""Reasons to skip a layer that lie in aligned and base."""

LayerPatcher = Callable[[ProjectedLayer], LayerPatch]
"""Computes the new update of one layer."""


class LayerSelector(Protocol):
    """What patching needs from a projection defense: the operator, and which layers to change."""

    name: ClassVar[str]
    """The defense's name, for messages."""

    @property
    def lowest(self) -> int | None:
        """The number of layers to change, if the defense changes the least similar ones."""
        ...

    def operator_for(self, delta: AlignmentDelta) -> Operator:
        """Return the operator that V = `delta` gives; V is not zero."""
        ...

    def select(self, similarities: Mapping[str, float]) -> frozenset[str]:
        """Return the layers to change, given the similarity of every layer."""
        ...


@runtime_checkable
class LayerExchanger(LayerSelector, Protocol):
    """A selector that replaces its choice once the report of every layer is known."""

    def exchange(self, chosen: frozenset[str], reports: Mapping[str, LayerReport]) -> frozenset[str]:
        """Return the layers to change instead of the chosen ones."""
        ...


class PatchedLayer(NamedTuple):
    """The result for one layer, as if it were selected."""

    update: Update
    """The new update."""
    report: LayerReport
    """The report of the layer with the new update."""


def patch_and_report(layer: ProjectedLayer, patcher: LayerPatcher) -> PatchedLayer:
    """Compute the new update of one layer, and report it as selected."""
    from stayaligned.algorithms.safe_lora import ScaledGram, compare, update_norm

    patch = patcher(layer)
    found = compare(layer.before, layer.projected)
    similarity, shrinkage, norm = found
    truncated = layer.operator if isinstance(layer.operator, ScaledGram) else None
    if patch.update is not layer.projected:
        shrinkage = update_norm(patch.update) / norm if norm else 1.0
    report = LayerReport(
        module=layer.name,
        similarity=similarity,
        shrinkage=shrinkage,
        selected=True,
        update_norm=norm,
        delta_norm=layer.delta.norm,
        subspace_rank=patch.subspace.rank if patch.subspace else None,
        captured_energy=patch.subspace.captured_energy if patch.subspace else None,
        truncation_error=truncated.truncation_error(found.shrinkage) if truncated else None,
        similarity_bounds=truncated.similarity_bounds(layer.before, found) if truncated else None,
    )
    return PatchedLayer(patch.update, report)


def skip_layer(name: str, delta: AlignmentDelta, update: Update, *, rounded: bool = False) -> LayerReport | None:
    """Return the report of a layer that no projection can change; None for all others.

    In such a layer the update or V is zero, or only rounding, and so has no direction.

    Args:
        name: the layer's name.
        delta: V.
        update: the update.
        rounded: whether the update is only rounding.
    """
    from stayaligned.algorithms.safe_lora import is_zero, update_norm

    zero = is_zero(update)
    if not (zero or rounded) and delta.norm and not delta.rounding:
        return None
    skipped = "zero_update" if zero else "rounded_update" if rounded else None
    return LayerReport(
        module=name,
        similarity=0.0,
        shrinkage=1.0,
        selected=False,
        update_norm=0.0 if zero else update_norm(update),
        delta_norm=delta.norm,
        skipped=skipped or ("rounded_direction" if delta.norm else "no_direction"),
    )


def report_unchanged(report: LayerReport) -> LayerReport:
    """Return the report of a layer that is not selected."""
    return report.model_copy(update={"selected": False, "shrinkage": 1.0})


def select_layers(selector: LayerSelector, reports: Sequence[LayerReport], models: ModelPair, origin: Path) -> Selected:
    """Select the layers to change from the reports of all layers.

    Args:
        selector: the projection defense.
        reports: a report for each layer.
        models: where V comes from, and whether undecided layers are allowed.
        origin: the adapter or checkpoint, for messages.

    Raises:
        StayalignedError: if no layer can be changed, `lowest` exceeds the number of layers that can be changed, or a
            subspace file leaves the selection open.
    """
    candidates = {report.module: report for report in reports if report.skipped is None}
    skipped = Counter(report.skipped for report in reports if report.skipped is not None)
    if reports and not candidates:
        raise _unpatchable(origin, len(reports), skipped)
    if selector.lowest is not None and selector.lowest > len(candidates):
        reason = f"; the other {skipped.total()} have {_reasons(skipped)}" if skipped else ""
        raise StayalignedError(
            f"{selector.name}: lowest is {selector.lowest}, but there are {len(candidates)} layers"
            f"{' that can be changed' if skipped else ''} in {origin}{reason}",
            hint="Lower it, or set all_layers.",
        )
    chosen = selector.select({name: report.similarity for name, report in candidates.items()})
    _refuse_deletion(selector, [candidates[name] for name in chosen], origin)
    undecided = _undecided(selector, candidates, chosen)
    if undecided and not models.allow_undecided:
        bounds = [candidates[name].similarity_bounds or (0.0, 0.0) for name in undecided]
        raise StayalignedError(
            f"{models.subspace} holds too little of V to tell which layers of {origin} to change: "
            f"{len(undecided)} of {len(candidates)} are undecided, their similarities known only to within "
            f"{max(high - low for low, high in bounds):.2g}: {list_names(sorted(undecided), 5)}",
            hint="Give --aligned and --base instead of the file, which decide every layer. A file with a larger --rank "
            "or --energy decides more of them (with --energy 1 all, at more than the size of V), --all needs no "
            "decision, and --allow-undecided accepts the file's approximate similarities.",
        )
    if isinstance(selector, LayerExchanger):
        chosen = selector.exchange(chosen, candidates)
    return Selected(chosen, undecided)


class Selected(NamedTuple):
    """The layers that a patch changes."""

    chosen: frozenset[str]
    undecided: frozenset[str]
    """The layers that the complete V may select otherwise."""

    def finish(self, report: LayerReport) -> LayerReport:
        """Return the final report of a layer, given its report as if it were selected."""
        if report.module in self.undecided:
            report = report.model_copy(update={"undecided": True})
        return report if report.module in self.chosen else report_unchanged(report)


def _refuse_deletion(selector: LayerSelector, chosen: Sequence[LayerReport], origin: Path) -> None:
    """Raise if an operator on V's directions leaves nothing of any selected update."""
    ranks = [report.subspace_rank for report in chosen if report.subspace_rank is not None]
    if ranks and len(ranks) == len(chosen) and all(report.shrinkage < _NOTHING for report in chosen):
        raise StayalignedError(
            f"{selector.name}: nothing would be left of the update in any of the {len(chosen)} selected layers of "
            f"{origin}: the {min(ranks)} to {max(ranks)} directions hold all of it",
            hint="Lower rank or energy; to delete updates on purpose, use the control `drop`.",
        )


def _undecided(
    selector: LayerSelector, candidates: Mapping[str, LayerReport], chosen: frozenset[str]
) -> frozenset[str]:
    """Return the layers whose bounds leave open if the complete V selects them."""
    bounds = {name: report.similarity_bounds for name, report in candidates.items()}
    known = {name: bound for name, bound in bounds.items() if bound is not None}
    if not known:
        return frozenset()
    if selector.lowest is None:
        ends = [selector.select({name: bound[end] for name, bound in known.items()}) for end in (0, 1)]
        return ends[0] ^ ends[1]
    rest = known.keys() - chosen
    if not chosen or not rest:
        return frozenset()
    lowest, highest = min(known[name][0] for name in rest), max(known[name][1] for name in chosen)
    return frozenset(
        name for name, (low, high) in known.items() if (high >= lowest if name in chosen else low <= highest)
    )


def _but_for_rounding(skipped: Mapping[str, int]) -> str:
    return ", but for rounding," if any(reason.startswith("rounded") for reason in skipped) else ""


def _reasons(skipped: Mapping[str, int]) -> str:
    words = {
        "zero_update": "a zero update",
        "rounded_update": "an update that is only rounding",
        "no_direction": "equal weights in aligned and base",
        "rounded_direction": "weights that only rounding makes different in aligned and base",
    }
    return " or ".join(words[reason] for reason in skipped)


def _unpatchable(origin: Path, layers: int, skipped: Mapping[str, int]) -> StayalignedError:
    """Return the error for an adapter or a checkpoint of which no layer can be changed."""
    if not set(skipped) & NO_DIRECTION:
        return StayalignedError(
            f"{origin}: the update is zero{_but_for_rounding(skipped)} in all {layers} layers: it was never trained, "
            "or it was removed",
            hint="Give a trained adapter, or a checkpoint that differs from the aligned model.",
        )
    if set(skipped) <= NO_DIRECTION:
        return StayalignedError(
            f"aligned and base are equal{_but_for_rounding(skipped)} in all {layers} layers that {origin} changes: "
            "there is no alignment direction",
            hint="Give the chat or instruct model as aligned and its pretrained ancestor as base. If the alignment "
            "changed other modules only, this method does not apply.",
        )
    return StayalignedError(
        f"{origin}: none of its {layers} layers can be changed: they have {_reasons(skipped)}",
        hint="Give a trained adapter, and an aligned model that differs from its base in the adapter's layers.",
    )
