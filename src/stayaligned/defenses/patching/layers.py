"""Patch one layer: its update, the operator that V gives, the new update and the report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol

from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import LayerReport

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

    def operator_for(self, delta: AlignmentDelta) -> Operator | None:
        """Return the operator that V = `delta` gives; None if V is zero and the operator is undefined."""
        ...

    def select(self, similarities: Mapping[str, float]) -> frozenset[str]:
        """Return the layers to change, given the similarity of every layer."""
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
    similarity, shrinkage, norm = compare(layer.before, layer.projected)
    truncation = layer.operator.truncation_error(shrinkage) if isinstance(layer.operator, ScaledGram) else None
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
        truncation_error=truncation,
    )
    return PatchedLayer(patch.update, report)


def report_unchanged(report: LayerReport) -> LayerReport:
    """Return the report of a layer that is not selected."""
    return report.model_copy(update={"selected": False, "shrinkage": 1.0})


def refuse_zero_deltas(selector: LayerSelector, names: Sequence[str]) -> None:
    """Raise if there are layers in which V is zero and the operator is undefined.

    Args:
        selector: the projection defense.
        names: those layers.

    Raises:
        StayalignedError: naming the layers, unless there are none.
    """
    if names:
        raise StayalignedError(
            f"{selector.name}: aligned and base are equal in {', '.join(names)}: the alignment direction is undefined "
            "there",
            hint="Target only modules that the alignment changed, or use the defense `complement`, which leaves these "
            "layers unchanged.",
        )
