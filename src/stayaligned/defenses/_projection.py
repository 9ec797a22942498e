"""The contracts of the defenses that patch layer by layer: a projection, and a control for one.

A `ProjectionDefense` defines the operator that V gives. A `Control` takes such a defense as `like` and changes exactly
the layers that this defense would change. Both report every layer, changed or not.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

from pydantic import BeforeValidator, Field, PlainSerializer, model_validator

from stayaligned.core.records import LayerReport
from stayaligned.defenses import DEFENSES, Execution, ModelPair, PatchDefense, PatchedAdapter
from stayaligned.defenses.patching.adapters import patch_adapters
from stayaligned.defenses.patching.full_weights import patch_weights
from stayaligned.defenses.patching.layers import LayerPatch, LayerSelector, ProjectedLayer

if TYPE_CHECKING:
    from stayaligned.algorithms.alignment_delta import AlignmentDelta
    from stayaligned.algorithms.safe_lora import Operator, Selection
    from stayaligned.weights.adapters import Adapter
    from stayaligned.weights.checkpoints import Checkpoint


class ProjectionDefense(PatchDefense):
    """A patch that replaces the updates of the selected layers by their image under an operator."""

    patches_full_weights: ClassVar[bool] = True

    threshold: float | None = Field(default=None, allow_inf_nan=False)
    """Change the layers with similarity strictly below this."""
    lowest: int | None = Field(default=None, ge=0)
    """Change exactly this many layers, the least similar ones."""
    all_layers: bool = False
    """Change every layer."""

    @model_validator(mode="after")
    def _check_selection(self) -> Self:
        if (self.threshold is not None) + (self.lowest is not None) + self.all_layers != 1:
            raise ValueError("set exactly one of `threshold`, `lowest` and `all_layers`")
        return self

    @abstractmethod
    def operator_for(self, delta: AlignmentDelta) -> Operator:
        """Return the operator that V = `delta` gives; layers where V is zero are left out before."""

    def patch_layer(self, layer: ProjectedLayer) -> LayerPatch:
        """Return the image of the layer's update."""
        return LayerPatch(layer.projected, layer.operator.subspace)

    def patch(self, adapter: Adapter, models: ModelPair) -> PatchedAdapter:
        """Replace the updates of the selected layers by their image under the operator."""
        return self.patch_all([adapter], models, Execution())[0]

    def patch_all(self, adapters: Sequence[Adapter], models: ModelPair, how: Execution) -> list[PatchedAdapter]:
        """Patch several adapters in one pass over the models' weights."""
        return patch_adapters(self, self.patch_layer, adapters, models, how, raises_rank=self.raises_rank)

    def patch_model(self, finetuned: Checkpoint, out: Path, models: ModelPair, how: Execution) -> list[LayerReport]:
        """W ← W_aligned + P(W_ft - W_aligned) in the selected layers (paper, equation 4), shard by shard."""
        return patch_weights(self, self.patch_layer, finetuned, out, models, how)

    def select(self, similarities: Mapping[str, float]) -> frozenset[str]:
        """Return the layers to change.

        Raises:
            ValueError: if `lowest` is larger than the number of layers.
        """
        from stayaligned.algorithms.safe_lora import select_all, select_below, select_lowest

        rule: Selection
        if self.lowest is not None:
            rule = select_lowest(self.lowest)
        else:
            rule = select_all if self.threshold is None else select_below(self.threshold)
        return rule(similarities)


class SubspaceDefense(ProjectionDefense):
    """A projection by V's k leading directions, of every layer unless `threshold` or `lowest` is given."""

    all_layers: bool = True
    """Change every layer. Excludes `threshold` and `lowest`."""
    rank: int | None = Field(default=8, ge=1)
    """Number k of V's leading directions. Excludes `energy`."""
    energy: float | None = Field(default=None, gt=0, le=1)
    """Take the fewest leading directions that hold this share of ‖V‖². Excludes `rank`."""

    @model_validator(mode="before")
    @classmethod
    def _replace_defaults(cls, data: Any) -> Any:
        # A default applies only if no alternative to it is given.
        if not isinstance(data, dict):
            return data
        selected = data.get("threshold") is not None or data.get("lowest") is not None
        replaced = {"all_layers": False} if selected else {}
        return replaced | ({"rank": None} if data.get("energy") is not None else {}) | data

    @model_validator(mode="after")
    def _check_size(self) -> Self:
        if (self.rank is None) == (self.energy is None):
            raise ValueError("set exactly one of `rank` and `energy`")
        return self


def _parse_projection_defense(spec: object) -> ProjectionDefense:
    defense = DEFENSES.parse(spec)
    if not isinstance(defense, ProjectionDefense):
        raise ValueError(f"{defense.name!r} is not a projection; name safe_lora, complement or csulora")
    return defense


Like = Annotated[
    ProjectionDefense, BeforeValidator(_parse_projection_defense), PlainSerializer(lambda defense: defense.spec())
]
"""A field that holds a projection defense, written in YAML as its name or as a mapping with its settings."""


class Control(PatchDefense):
    """A patch that is compared with the projection defense `like`: its layers by another operation, or other layers.

    Its reports give `like`'s similarities.
    """

    patches_full_weights: ClassVar[bool] = True

    like: Like
    """The projection defense that this control is compared with; it selects the layers."""

    @property
    def selector(self) -> LayerSelector:
        """What selects the layers to change: `like`."""
        return self.like

    def identity(self) -> dict[str, Any]:
        """Return `spec()` with the versions of both defenses."""
        return {**super().identity(), "like": self.like.identity()}

    @abstractmethod
    def patch_layer(self, layer: ProjectedLayer) -> LayerPatch:
        """Return the new update of a selected layer."""

    def patch(self, adapter: Adapter, models: ModelPair) -> PatchedAdapter:
        """Change the layers that `like` selects."""
        return self.patch_all([adapter], models, Execution())[0]

    def patch_all(self, adapters: Sequence[Adapter], models: ModelPair, how: Execution) -> list[PatchedAdapter]:
        """Patch several adapters in one pass over the models' weights."""
        return patch_adapters(self.selector, self.patch_layer, adapters, models, how)

    def patch_model(self, finetuned: Checkpoint, out: Path, models: ModelPair, how: Execution) -> list[LayerReport]:
        """Change the layers of a full fine-tune that `like` selects, shard by shard."""
        return patch_weights(self.selector, self.patch_layer, finetuned, out, models, how)
