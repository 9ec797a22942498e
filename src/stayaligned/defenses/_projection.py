"""What the layer-by-layer defenses share: past each update streams its V; selected layers get a new update.

A `ProjectionDefense` says which operator V gives. A `Control` takes such a defense as `like`, and by construction
changes exactly the layers that it would change. Both report every layer, changed or not.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

from pydantic import BeforeValidator, Field, PlainSerializer, model_validator

from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import LayerReport
from stayaligned.defenses import DEFENSES, Execution, ModelPair, PatchDefense, PatchedAdapter
from stayaligned.defenses.patching.adapters import patch_adapters
from stayaligned.defenses.patching.layers import (
    LayerEdit,
    ProjectedLayer,
)

if TYPE_CHECKING:
    from stayaligned.algorithms.alignment_delta import AlignmentDelta
    from stayaligned.algorithms.safe_lora import Operator, Selection
    from stayaligned.weights.adapters import Adapter
    from stayaligned.weights.checkpoints import Checkpoint


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
