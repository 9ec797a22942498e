"""Control: the same update, smaller."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from stayaligned.defenses._projection import Control, Like
from stayaligned.defenses.patching.layers import LayerEdit, ProjectedLayer
from stayaligned.defenses.safe_lora import SafeLora


class Shrink(Control):
    """Control: in the layers that a projection would change, scale the update to the norm that it would leave.

    ΔW ← f ΔW with f = ‖PΔW‖/‖ΔW‖ for each layer, P the operator of `like`. What a projection wins over this control is
    due to the direction, not to the size, of what it keeps. With `factor` the f is given, the same in each such layer.
    """

    name: ClassVar[str] = "shrink"

    like: Like = Field(default_factory=SafeLora)
    factor: float | None = Field(default=None, ge=0, le=1)
    """f for every selected layer; unset, each layer gets the norm that `like` leaves it."""

    def edit(self, seen: ProjectedLayer) -> LayerEdit:
        """B ← f B."""
        from stayaligned.algorithms.safe_lora import compare, scaled

        factor = compare(seen.before, seen.projected).shrinkage if self.factor is None else self.factor
        return LayerEdit(scaled(seen.before, factor), None)
