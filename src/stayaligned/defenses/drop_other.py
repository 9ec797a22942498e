"""Control: remove the update of other layers than those that a projection would change."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from stayaligned.defenses._projection import Control, Like
from stayaligned.defenses.patching.exchange import ExchangedLayers, LayerMatch, LayerOrder
from stayaligned.defenses.patching.layers import LayerPatch, LayerSelector, ProjectedLayer
from stayaligned.defenses.safe_lora import SafeLora


class DropOther(Control):
    """Control: remove the update of other layers than a projection would change.

    Where `drop` does better than this control, the reason is the projection's choice of layers, not how much of the
    update is removed. Draw several times, with other seeds: draws differ widely.

    Example:
        >>> DropOther(layers="most_similar", match="count").like.name
        'safe_lora'
    """

    name: ClassVar[str] = "drop_other"

    like: Like = Field(default_factory=SafeLora)
    """The projection defense that this control is compared with; it says how many layers, and how much, to remove."""
    layers: LayerOrder = "random"
    """`random`: layers drawn at random. `most_similar`: from the other end of the projection's list."""
    match: LayerMatch = "norm"
    """What equals the projection's choice. `norm`: the norm of the update that is left, as near as whole layers allow.
    `count`: the number of layers. `kind`: the number of layers of each kind (`q_proj`, `up_proj`), and for random
    layers also the norm that is left, to 2 %."""
    seed: int = Field(default=0, ge=0)
    """Seed of the draw; unused for `most_similar`."""

    @property
    def selector(self) -> LayerSelector:
        """The projection defense with its choice exchanged."""
        return ExchangedLayers(self.like, self.layers, self.match, self.seed)

    def patch_layer(self, layer: ProjectedLayer) -> LayerPatch:
        """B ← 0."""
        from stayaligned.algorithms.safe_lora import scale_update

        return LayerPatch(scale_update(layer.before, 0.0), None)
