"""Control: the same operator on directions that know nothing of the alignment."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import ClassVar

from pydantic import Field

from stayaligned.defenses._projection import Control, Like
from stayaligned.defenses.complement import Complement
from stayaligned.defenses.patching.layers import LayerEdit, ProjectedLayer


class RandomSubspace(Control):
    """Control: in the layers that a projection would change, the same operator with random directions of the same rank.

    What a projection wins over this control is not due to the number of directions alone. For `complement` and
    `operator: orthogonal`, V's directions are replaced by as many uniformly random ones; for the paper's C, V is turned
    by a uniformly random rotation (C ← R C Rᵀ), which keeps its spectrum. It is not matched in norm (random directions
    hold less of an update than V's): for that see `shrink`.
    """

    name: ClassVar[str] = "random_subspace"

    like: Like = Field(default_factory=Complement)
    seed: int = Field(default=0, ge=0)
    """With the layer's name it fixes the directions."""

    def edit(self, seen: ProjectedLayer) -> LayerEdit:
        """The operator with U and Q replaced by random orthonormal directions, or C by R C Rᵀ."""
        import torch

        from stayaligned.algorithms.alignment_delta import random_subspace
        from stayaligned.algorithms.safe_lora import Complement as ComplementOperator
        from stayaligned.algorithms.safe_lora import Orthogonal, RandomlyRotated, ScaledGram

        digest = hashlib.sha256(f"{self.seed}/{seen.name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        operator = seen.operator
        if isinstance(operator, ScaledGram):
            return LayerEdit(RandomlyRotated(operator, generator)(seen.before), None)
        if not isinstance(operator, ComplementOperator | Orthogonal):
            raise TypeError(f"{type(operator).__name__} has no directions that could be replaced")
        randomised = replace(operator, directions=random_subspace(seen.delta, operator.subspace, generator))
        return LayerEdit(randomised(seen.before), randomised.subspace)
