"""What the layer-by-layer defenses share: past each LoRA layer streams its V; selected layers get new factors.

A `ProjectionDefense` says which operator V gives. A `Control` takes such a defense as `like`, and by construction
changes exactly the layers that it would change. Both report every layer, changed or not.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import BeforeValidator, Field, PlainSerializer, model_validator

from stayaligned.defenses import DEFENSES, ModelPair, PatchDefense, PatchedAdapter
from stayaligned.errors import StayalignedError
from stayaligned.records import LayerReport

if TYPE_CHECKING:
    from torch import Tensor

    from stayaligned.adapters import Adapter, LoraLayer
    from stayaligned.projection import AlignmentSubspace, LoraFactors, Operator, Selection


@dataclass(frozen=True, slots=True, eq=False)
class ProjectedLayer:
    """One layer while its V is in memory."""

    layer: LoraLayer
    delta: Tensor
    """V, (out, in)."""
    operator: Operator
    before: LoraFactors
    projected: LoraFactors
    """`operator(before)`."""


@dataclass(frozen=True, slots=True, eq=False)
class LayerEdit:
    """What to put in the place of a layer's update, should the layer be selected."""

    factors: LoraFactors
    subspace: AlignmentSubspace | None


class ProjectionDefense(PatchDefense):
    """A patch that replaces the updates of some layers by an operator's image of them."""

    threshold: float | None = None
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
    def operator_for(self, delta: Tensor) -> Operator | None:
        """The operator that V = `delta` gives; None if it gives none because V is zero."""

    def patch(self, adapter: Adapter, models: ModelPair) -> PatchedAdapter:
        """Replace the selected layers' updates by the operator's image of them."""
        return patch_layers(self, adapter, models, lambda seen: LayerEdit(seen.projected, seen.operator.subspace))

    def select(self, similarities: dict[str, float]) -> frozenset[str]:
        """The modules to change.

        Raises:
            StayalignedError: if `lowest` asks for more layers than there are.
        """
        from stayaligned.projection import below, every, lowest

        rule: Selection
        if self.lowest is not None:
            if self.lowest > len(similarities):
                raise StayalignedError(
                    f"{self.name}: lowest is {self.lowest}, but the adapter has {len(similarities)} LoRA layers",
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
    """Changes the layers that `like` would change, in another way."""

    like: Like
    """The defense that this one controls for; it selects the layers."""

    def identity(self) -> dict[str, Any]:
        """`spec()` with the versions of both behaviours."""
        return {**super().identity(), "like": self.like.identity()}

    @abstractmethod
    def edit(self, seen: ProjectedLayer) -> LayerEdit:
        """The update that takes the layer's place."""

    def patch(self, adapter: Adapter, models: ModelPair) -> PatchedAdapter:
        """Edit the layers that `like` selects. In the reports, `similarity` is the one by which `like` selected."""
        return patch_layers(self.like, adapter, models, self.edit)


def patch_layers(
    selector: ProjectionDefense, adapter: Adapter, models: ModelPair, edit: Callable[[ProjectedLayer], LayerEdit]
) -> PatchedAdapter:
    """Stream V past every LoRA layer, select by `selector`, and put in the edits of the selected layers.

    Memory: the adapter, and two weights of the model (the one at work and the next one, being read).

    Raises:
        StayalignedError: if adapter, aligned and base don't fit together, or V is zero where the operator needs it.
    """
    reports: dict[str, LayerReport] = {}
    edits: dict[str, tuple[LoraLayer, LoraFactors]] = {}
    without_direction: list[str] = []
    for layer, delta in _iter_layers(selector.name, adapter, models):
        operator = selector.operator_for(delta)
        if operator is None:
            without_direction.append(layer.name)
        else:
            factors, reports[layer.name] = _edit_layer(layer, delta, operator, adapter.factors(layer), edit)
            edits[layer.name] = layer, factors
        del delta, operator  # or this V would live on while the next ones are read
    if without_direction:
        raise StayalignedError(
            f"{selector.name}: aligned and base are equal in {', '.join(without_direction)}: there the alignment "
            "direction is undefined",
            hint="Target only modules that the alignment changed, or use the defense `complement`, which leaves them.",
        )
    selected = selector.select({name: report.similarity for name, report in reports.items()})
    layers = [
        report if name in selected else report.model_copy(update={"selected": False, "shrinkage": 1.0})
        for name, report in reports.items()
    ]
    return PatchedAdapter(adapter.with_factors(dict(edits[name] for name in reports if name in selected)), layers)


def _edit_layer(
    layer: LoraLayer,
    delta: Tensor,
    operator: Operator,
    before: LoraFactors,
    edit: Callable[[ProjectedLayer], LayerEdit],
) -> tuple[LoraFactors, LayerReport]:
    """The factors that the layer gets if it is selected, and the report of that case."""
    from stayaligned.projection import frobenius_norm, shrinkage, update_norm, update_similarity

    projected = operator(before)
    edited = edit(ProjectedLayer(layer, delta, operator, before, projected))
    return edited.factors, LayerReport(
        module=layer.name,
        similarity=update_similarity(before, projected),
        shrinkage=shrinkage(before, edited.factors),
        selected=True,
        update_norm=update_norm(before),
        delta_norm=frobenius_norm(delta),
        subspace_rank=edited.subspace.rank if edited.subspace else None,
        captured_energy=edited.subspace.captured_energy if edited.subspace else None,
    )


def _iter_layers(defense: str, adapter: Adapter, models: ModelPair) -> Iterator[tuple[LoraLayer, Tensor]]:
    from stayaligned.checkpoints import iter_deltas, open_checkpoint
    from stayaligned.hf.layers import lora_layers, refuse_swapped, weight_names

    aligned, base = open_checkpoint(models.aligned), open_checkpoint(models.require_base(defense))
    refuse_swapped(adapter, aligned, base)
    layers = {layer.name: layer for layer in lora_layers(adapter, aligned)}
    in_aligned = weight_names(aligned, list(layers.values()))
    in_base = weight_names(base, list(layers.values()))
    for name, value in iter_deltas(aligned, base, {name: (in_aligned[name], in_base[name]) for name in layers}):
        yield layers[name], value.T if layers[name].transposed else value
        del value
