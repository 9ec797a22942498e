"""Control: remove the update."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from stayaligned.defenses._projection import Control, Like
from stayaligned.defenses.patching.layers import LayerPatch, ProjectedLayer
from stayaligned.defenses.safe_lora import SafeLora


class Drop(Control):
    """Control: in the layers that a projection would change, remove the update.

    Where a projection does better than this control, the reason is what it keeps of the update. With `all_layers` the
    result is the aligned model.
    """

    name: ClassVar[str] = "drop"

    like: Like = Field(default_factory=SafeLora)
    """The projection defense that this control is compared with; it selects the layers."""

    def patch_layer(self, layer: ProjectedLayer) -> LayerPatch:
        """B ← 0."""
        from stayaligned.algorithms.safe_lora import scale_update

        return LayerPatch(scale_update(layer.before, 0.0), None)
