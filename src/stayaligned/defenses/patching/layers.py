"""One layer under a patch: its update, the operator, the edit and the report."""

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


class LayerSelector(Protocol):
    """What a patch asks of the projection defense that chooses the layers."""

    name: ClassVar[str]
    """The defense's name, for messages."""

    @property
    def lowest(self) -> int | None:
        """The number of layers to change, if the defense changes the least similar ones."""
        ...

    def operator_for(self, delta: AlignmentDelta) -> Operator | None:
        """The operator that V = `delta` gives; None if V is zero and the operator is undefined."""
        ...

    def select(self, similarities: Mapping[str, float]) -> frozenset[str]:
        """The layers to change, of all layers with their similarities."""
        ...


class WorkedLayer(NamedTuple):
    """What became of one adapter's layer: the update it gets if it is selected, and the report of that case."""

    update: Update
    report: LayerReport


def work_layer(seen: ProjectedLayer, edit: Edit) -> WorkedLayer:
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
    return WorkedLayer(edited.update, report)


def refuse_undirected(selector: LayerSelector, names: Sequence[str]) -> None:
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
