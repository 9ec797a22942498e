"""Control: scale the update down."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from stayaligned.defenses._projection import Control, Like
from stayaligned.defenses.patching.layers import LayerPatch, ProjectedLayer
from stayaligned.defenses.safe_lora import SafeLora


class Shrink(Control):
    """Control: scale the updates that a projection would change to the norm it leaves.

    ΔW ← f ΔW with f = ‖PΔW‖/‖ΔW‖ for each layer, P the operator of `like`. Where a projection does better than this
    control, the reason is the direction, not the size, of what it keeps. With `factor`, every selected layer
    gets that f.
    """

    name: ClassVar[str] = "shrink"

    like: Like = Field(default_factory=SafeLora)
    """The projection defense that this control is compared with; it selects the layers."""
    factor: float | None = Field(default=None, ge=0, le=1)
    """Factor f for every selected layer; if unset, each layer gets the norm that `like` leaves it."""

    def patch_layer(self, layer: ProjectedLayer) -> LayerPatch:
        """B ← f B."""
        from stayaligned.algorithms.safe_lora import compare, scale_update

        factor = compare(layer.before, layer.projected).shrinkage if self.factor is None else self.factor
        return LayerPatch(scale_update(layer.before, factor), None)
