"""Control: no update at all."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from stayaligned.defenses._projection import Control, Like
from stayaligned.defenses.patching.layers import LayerEdit, ProjectedLayer
from stayaligned.defenses.safe_lora import SafeLora


class Drop(Control):
    """Control: in the layers that a projection would change, remove the update (B ← 0).

    What a projection wins over this control is due to what it keeps. With `all_layers` the result is the aligned model.
    """

    name: ClassVar[str] = "drop"

    like: Like = Field(default_factory=SafeLora)

    def edit(self, seen: ProjectedLayer) -> LayerEdit:
        """B ← 0."""
        from stayaligned.algorithms.safe_lora import scaled

        return LayerEdit(scaled(seen.before, 0.0), None)
