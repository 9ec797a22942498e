"""Control: the same operator on directions that know nothing of the alignment."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import ClassVar, Self

from pydantic import Field, model_validator

from stayaligned.defenses._layerwise import Control, LayerEdit, Like, ProjectedLayer
from stayaligned.defenses.complement import Complement
from stayaligned.defenses.safe_lora import SafeLora


class RandomSubspace(Control):
    """Control: in the layers that a projection would change, the same operator with random directions of the same rank.

    What a projection wins over this control is not due to the number of directions alone. It is not matched in norm
    (random directions hold less of an update than V's): for that see `shrink`. The paper's C has no subspace, so `like`
    is `complement`, or `safe_lora` with `operator: orthogonal`.
    """

    name: ClassVar[str] = "random_subspace"

    like: Like = Field(default_factory=Complement)
    seed: int = Field(default=0, ge=0)
    """With the layer's name it fixes the directions."""

    @model_validator(mode="after")
    def _like_has_a_subspace(self) -> Self:
        if isinstance(self.like, SafeLora) and self.like.operator == "scaled_gram":
            raise ValueError("safe_lora's scaled_gram has no subspace to randomise: use `operator: orthogonal`")
        return self

    def edit(self, seen: ProjectedLayer) -> LayerEdit:
        """The operator with U and Q replaced by random orthonormal directions."""
        import torch

        from stayaligned.projection import Complement as ComplementOperator
        from stayaligned.projection import Orthogonal, random_subspace

        operator = seen.operator
        if not isinstance(operator, ComplementOperator | Orthogonal):
            raise TypeError(f"{type(operator).__name__} is built on no subspace")
        digest = hashlib.sha256(f"{self.seed}/{seen.layer.name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        randomised = replace(operator, subspace=random_subspace(seen.delta, operator.subspace.rank, generator))
        return LayerEdit(randomised(seen.before), randomised.subspace)
