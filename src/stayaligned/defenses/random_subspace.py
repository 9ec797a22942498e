"""Control: the same operator on random directions."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from pydantic import Field

from stayaligned.defenses._projection import Control, Like
from stayaligned.defenses.complement import Complement
from stayaligned.defenses.patching.layers import LayerPatch, ProjectedLayer


class RandomSubspace(Control):
    """Control: the operator of a projection with random directions of the same rank.

    Where a projection does better than this control, the reason is not the number of directions alone. For
    `complement`, `csulora` and `operator: orthogonal`, V's directions are replaced by as many uniformly random ones;
    for the paper's C, V is rotated by a uniformly random rotation (C ← R C Rᵀ), which keeps its spectrum. The norms are
    not matched (random directions hold less of an update than V's); `shrink` matches them.
    """

    name: ClassVar[str] = "random_subspace"
    raises_rank: ClassVar[bool] = True

    like: Like = Field(default_factory=Complement)
    """The projection defense that this control is compared with; it selects the layers."""
    seed: int = Field(default=0, ge=0)
    """Seed of the random directions, combined with the layer's name."""

    def patch_layer(self, layer: ProjectedLayer) -> LayerPatch:
        """Apply the operator with U and Q replaced by random orthonormal directions, or C by R C Rᵀ."""
        from stayaligned.algorithms.alignment_delta import layer_generator, random_subspace
        from stayaligned.algorithms.csulora import BlockAttenuation
        from stayaligned.algorithms.safe_lora import ComplementOperator, Orthogonal, RandomlyRotated, ScaledGram

        generator = layer_generator(self.seed, layer.name)
        operator = layer.operator
        if isinstance(operator, ScaledGram):
            return LayerPatch(RandomlyRotated(operator, generator)(layer.before), None)
        if not isinstance(operator, BlockAttenuation | ComplementOperator | Orthogonal):
            raise TypeError(f"{type(operator).__name__} has no directions to replace")
        randomized = replace(operator, directions=random_subspace(layer.delta, operator.subspace, generator))
        return LayerPatch(randomized(layer.before), randomized.subspace)
