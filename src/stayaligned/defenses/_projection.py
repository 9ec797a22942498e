"""What the layer-by-layer defenses share: past each update streams its V; selected layers get a new update.

A `ProjectionDefense` says which operator V gives. A `Control` takes such a defense as `like`, and by construction
changes exactly the layers that it would change. Both report every layer, changed or not.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple, Protocol, Self, TypeVar, cast

from pydantic import BeforeValidator, Field, PlainSerializer, model_validator

from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import LayerReport
from stayaligned.defenses import DEFENSES, Execution, ModelPair, PatchDefense, PatchedAdapter

if TYPE_CHECKING:
    from stayaligned.algorithms.alignment_delta import AlignmentDelta, AlignmentSubspace
    from stayaligned.algorithms.safe_lora import LoraFactors, Operator, Selection, Update
    from stayaligned.weights.adapters import Adapter, LoraLayer
    from stayaligned.weights.checkpoints import Checkpoint

T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class ProjectedLayer:
    """One update while its V is in memory."""

    name: str
    """The layer's name."""
    delta: AlignmentDelta
    """V, (out, in)."""
    operator: Operator
    before: Update
    """Factors of a LoRA, or W_ft - W_aligned as a matrix (out, in)."""
    projected: Update
    """`operator(before)`."""


@dataclass(frozen=True, slots=True, eq=False)
class LayerEdit:
    """What to put in the place of a layer's update, should the layer be selected."""

    update: Update
    subspace: AlignmentSubspace | None


Edit = Callable[[ProjectedLayer], LayerEdit]


class ProjectionDefense(PatchDefense):
    """A patch that replaces the updates of some layers by an operator's image of them."""

    patches_full_weights: ClassVar[bool] = True

    threshold: float | None = Field(default=None, allow_inf_nan=False)
    """Change the layers with similarity strictly below this."""
    lowest: int | None = Field(default=None, ge=0)
    """Change exactly this many layers, the least similar ones."""
    all_layers: bool = False
    """Change every layer."""

    @model_validator(mode="after")
    def _one_selection(self) -> Self:
        if (self.threshold is not None) + (self.lowest is not None) + self.all_layers != 1:
            raise ValueError("set exactly one of `threshold`, `lowest` and `all_layers`")
        return self

    @abstractmethod
    def operator_for(self, delta: AlignmentDelta) -> Operator | None:
        """The operator that V = `delta` gives; None if it gives none because V is zero."""

    def edit(self, seen: ProjectedLayer) -> LayerEdit:
        """The operator's image."""
        return LayerEdit(seen.projected, seen.operator.subspace)

    def patch(self, adapter: Adapter, models: ModelPair) -> PatchedAdapter:
        """Replace the selected layers' updates by the operator's image of them."""
        return self.patch_all([adapter], models, Execution())[0]

    def patch_all(self, adapters: Sequence[Adapter], models: ModelPair, how: Execution) -> list[PatchedAdapter]:
        """The same for several adapters, in one pass over the weights."""
        return patch_adapters(self, self.edit, adapters, models, how)

    def patch_model(self, finetuned: Checkpoint, out: Path, models: ModelPair, how: Execution) -> list[LayerReport]:
        """W ← W_aligned + P(W_ft - W_aligned) in the selected layers (paper, equation 4), shard by shard."""
        from stayaligned.defenses.patching.full_weights import patch_weights

        return patch_weights(self, self.edit, finetuned, out, models, how)

    def select(self, similarities: Mapping[str, float]) -> frozenset[str]:
        """The modules to change.

        Raises:
            StayalignedError: if `lowest` asks for more layers than there are.
        """
        from stayaligned.algorithms.safe_lora import below, every, lowest

        rule: Selection
        if self.lowest is not None:
            if self.lowest > len(similarities):
                raise StayalignedError(
                    f"{self.name}: lowest is {self.lowest}, but there are {len(similarities)} layers",
                    hint="Lower it, or set all_layers.",
                )
            rule = lowest(self.lowest)
        else:
            rule = every if self.threshold is None else below(self.threshold)
        return rule(similarities)


def _projection_defense(spec: object) -> ProjectionDefense:
    defense = DEFENSES.parse(spec)
    if not isinstance(defense, ProjectionDefense):
        raise ValueError(f"{defense.name!r} is no defense that projects; name safe_lora or complement")
    return defense


Like = Annotated[
    ProjectionDefense, BeforeValidator(_projection_defense), PlainSerializer(lambda defense: defense.spec())
]
"""A field that holds a projection defense, written in YAML as its name or as a mapping with its settings."""


class Control(PatchDefense):
    """Changes the layers that `like` would change, in another way. In its reports, `similarity` is that of `like`."""

    patches_full_weights: ClassVar[bool] = True

    like: Like
    """The defense that this one controls for; it selects the layers."""

    def identity(self) -> dict[str, Any]:
        """`spec()` with the versions of both behaviours."""
        return {**super().identity(), "like": self.like.identity()}

    @abstractmethod
    def edit(self, seen: ProjectedLayer) -> LayerEdit:
        """The update that takes the layer's place."""

    def patch(self, adapter: Adapter, models: ModelPair) -> PatchedAdapter:
        """Edit the layers that `like` selects."""
        return self.patch_all([adapter], models, Execution())[0]

    def patch_all(self, adapters: Sequence[Adapter], models: ModelPair, how: Execution) -> list[PatchedAdapter]:
        """The same for several adapters, in one pass over the weights."""
        return patch_adapters(self.like, self.edit, adapters, models, how)

    def patch_model(self, finetuned: Checkpoint, out: Path, models: ModelPair, how: Execution) -> list[LayerReport]:
        """Edit the layers of a full fine-tune that `like` selects."""
        from stayaligned.defenses.patching.full_weights import patch_weights

        return patch_weights(self.like, self.edit, finetuned, out, models, how)


class DeltaSource(Protocol):
    """Where the V of a layer comes from: a pair of checkpoints, or a subspace file."""

    def layers_of(self, adapter: Adapter) -> tuple[list[LoraLayer], Sequence[str]]:
        """The adapter's layers, checked against the source, and notes for its record."""
        ...

    def visit(
        self, names: Sequence[str], work: Callable[[str, AlignmentDelta], T], how: Execution
    ) -> Iterator[tuple[str, T]]:
        """Call `work` with each named layer's V; yields (name, result), in whatever order suits the source."""
        ...


class CheckpointPair:
    """V streamed from the aligned checkpoint and its base."""

    def __init__(self, aligned: str | Path, base: str | Path) -> None:
        from stayaligned.weights.checkpoints import Weight, open_checkpoint

        self._aligned, self._base = open_checkpoint(aligned), open_checkpoint(base)
        self._stored: dict[str, tuple[Weight, Weight]] = {}
        self._transposed: dict[str, bool] = {}

    def layers_of(self, adapter: Adapter) -> tuple[list[LoraLayer], Sequence[str]]:
        """By the adapter's configuration on the aligned model."""
        from stayaligned.hf.placement.layers import place_adapter, refuse_swapped

        note = refuse_swapped(adapter, self._aligned, self._base)
        placed = place_adapter(adapter, self._aligned, self._base)
        for item in placed:
            self._stored[item.layer.name] = item.aligned, item.base
            self._transposed[item.layer.name] = item.layer.transposed
        return [item.layer for item in placed], [note] if note else []

    def visit(
        self, names: Sequence[str], work: Callable[[str, AlignmentDelta], T], how: Execution
    ) -> Iterator[tuple[str, T]]:
        """Read and subtract while computing; an error if nothing differs at all."""
        from stayaligned.algorithms.alignment_delta import FullDelta
        from stayaligned.weights.deltas import Delta, paired, refuse_equal, stream

        norms: list[float] = []

        def one(name: str, differences: list[Delta]) -> T:
            ((_, value, norm),) = differences
            norms.append(norm)
            return work(name, FullDelta(value.T if self._transposed[name] else value, norm))

        def place(name: str) -> tuple[str, int]:
            span = self._aligned.spans(self._stored[name][0])[0]
            return span.file.path.name, span.offset

        # Along the files, which is what disks and the system's read-ahead like.
        ordered = sorted(names, key=place)
        items = paired(self._aligned, self._base, {name: self._stored[name] for name in ordered})
        yield from stream(items, one, device=how.device, progress=how.progress)
        if names and not any(norms):
            raise refuse_equal(self._aligned, self._base)


class SubspaceSource:
    """V's leading part from a subspace file."""

    def __init__(self, path: Path, aligned: str | Path | None) -> None:
        from stayaligned.weights.checkpoints import open_checkpoint
        from stayaligned.weights.subspace_file import SubspaceFile

        self._file = SubspaceFile(path)
        if aligned is not None:
            self._file.refuse_other_model(open_checkpoint(aligned))

    def layers_of(self, adapter: Adapter) -> tuple[list[LoraLayer], Sequence[str]]:
        """By the adapter's tensors, against the modules in the file."""
        note = self._file.refuse_mismatch(adapter)
        return self._file.layers_of(adapter), [note] if note else []

    def visit(
        self, names: Sequence[str], work: Callable[[str, AlignmentDelta], T], how: Execution
    ) -> Iterator[tuple[str, T]]:
        """One module after the other in one thread: for products this small, others cost more than they save."""
        import torch

        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            for name in names:
                yield name, work(name, self._file.delta(name).to(how.device))
        finally:
            torch.set_num_threads(threads)


def open_source(models: ModelPair, defense: str) -> DeltaSource:
    """The subspace file if there is one, else the two checkpoints."""
    if models.subspace is not None:
        return SubspaceSource(models.subspace, models.aligned)
    return CheckpointPair(models.require_aligned(defense), models.require_base(defense))


class _Worked(NamedTuple):
    """What became of one adapter's layer: the update it gets if it is selected, and the report of that case."""

    update: Update
    report: LayerReport


def patch_adapters(
    selector: ProjectionDefense, edit: Edit, adapters: Sequence[Adapter], models: ModelPair, how: Execution
) -> list[PatchedAdapter]:
    """Stream V past every layer of the adapters, select by `selector`, and put in the edits of the selected layers.

    Memory: the adapters twice, and what `deltas.stream` holds. Time: one pass over the weights whatever the number of
    adapters, and products that grow with the sum of their ranks.

    Raises:
        StayalignedError: if adapters, aligned and base don't fit together, or V is zero where the operator needs it.
    """
    source = open_source(models, selector.name)
    placed, notes = zip(*(source.layers_of(adapter) for adapter in adapters), strict=True)
    users: dict[str, list[tuple[int, LoraLayer]]] = {}
    for index, layers in enumerate(placed):
        for layer in layers:
            users.setdefault(layer.name, []).append((index, layer))

    def work(name: str, delta: AlignmentDelta) -> list[_Worked] | None:
        operator = selector.operator_for(delta)
        if operator is None:
            return None
        before = [adapters[index].factors(layer).to(how.device) for index, layer in users[name]]
        after = together(operator, before)
        worked = (
            work_layer(ProjectedLayer(name, delta, operator, x, y), edit) for x, y in zip(before, after, strict=True)
        )
        # Kept until the last layer is seen, so in the adapter's own precision.
        return [
            one._replace(update=adapters[i].stored(layer, cast("LoraFactors", one.update)))
            for one, (i, layer) in zip(worked, users[name], strict=True)
        ]

    found: list[dict[str, tuple[LoraLayer, _Worked]]] = [{} for _ in adapters]
    without_direction: list[str] = []
    for name, worked in source.visit(list(users), work, how):
        if worked is None:
            without_direction.append(name)
        for (index, layer), one in zip(users[name], worked or (), strict=worked is not None):
            found[index][name] = layer, one
    refuse_undirected(selector, without_direction)
    in_order = [{layer.name: one[layer.name] for layer in layers} for layers, one in zip(placed, found, strict=True)]
    return [_assemble(selector, *each) for each in zip(adapters, in_order, notes, strict=True)]


def work_layer(seen: ProjectedLayer, edit: Edit) -> _Worked:
    """The edit of one layer, and its report as a layer that is selected."""
    from stayaligned.algorithms.safe_lora import ScaledGram, compare, update_norm

    edited = edit(seen)
    similarity, shrinkage, norm = compare(seen.before, seen.projected)
    truncation = seen.operator.truncation_error(shrinkage) if isinstance(seen.operator, ScaledGram) else None
    if edited.update is not seen.projected:
        shrinkage = update_norm(edited.update) / norm if norm else 1.0
    report = LayerReport(
        module=seen.name,
        similarity=similarity,
        shrinkage=shrinkage,
        selected=True,
        update_norm=norm,
        delta_norm=seen.delta.norm,
        subspace_rank=edited.subspace.rank if edited.subspace else None,
        captured_energy=edited.subspace.captured_energy if edited.subspace else None,
        truncation_error=truncation,
    )
    return _Worked(edited.update, report)


def refuse_undirected(selector: ProjectionDefense, names: Sequence[str]) -> None:
    """Raise if there are layers in which V is zero and the operator needs it.

    Raises:
        StayalignedError: naming them.
    """
    if names:
        raise StayalignedError(
            f"{selector.name}: aligned and base are equal in {', '.join(names)}: there the alignment direction is "
            "undefined",
            hint="Target only modules that the alignment changed, or use the defense `complement`, which leaves them.",
        )


def unselected(report: LayerReport) -> LayerReport:
    """The report of a layer that stays as it is."""
    return report.model_copy(update={"selected": False, "shrinkage": 1.0})


def together(operator: Operator, updates: Sequence[LoraFactors]) -> list[LoraFactors]:
    """The operator on several updates in one product: it acts on each column of B and each row of A alone."""
    import torch

    from stayaligned.algorithms.safe_lora import LoraFactors

    ranks = [update.b.shape[1] for update in updates]
    stacked = torch.cat([update.a for update in updates])
    outputs = operator.outputs(torch.cat([update.b for update in updates], dim=1)).split(ranks, dim=1)
    mapped = operator.inputs(stacked)
    # An A that stays is the same tensor, by which its Gram matrix is known again.
    inputs = [update.a for update in updates] if mapped is stacked else mapped.split(ranks)
    return [LoraFactors(a, b, update.scaling) for a, b, update in zip(inputs, outputs, updates, strict=True)]


def _assemble(
    selector: ProjectionDefense,
    adapter: Adapter,
    found: Mapping[str, tuple[LoraLayer, _Worked]],
    notes: Sequence[str],
) -> PatchedAdapter:
    selected = selector.select({name: worked.report.similarity for name, (_, worked) in found.items()})
    reports = [w.report if name in selected else unselected(w.report) for name, (_, w) in found.items()]
    edits: dict[LoraLayer, Any] = {layer: worked.update for name, (layer, worked) in found.items() if name in selected}
    return PatchedAdapter(adapter.with_factors(edits), reports, notes)
