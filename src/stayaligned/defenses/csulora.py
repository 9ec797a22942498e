"""CSULoRA: attenuate what of an update lies outside the alignment subspace."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from stayaligned.defenses._projection import SubspaceDefense

if TYPE_CHECKING:
    from stayaligned.algorithms.alignment_delta import AlignmentDelta
    from stayaligned.algorithms.safe_lora import Operator


class CsuLora(SubspaceDefense):
    """Attenuate what of each update lies outside V's leading directions (CSULoRA).

    X = D_0 + D_1/(1 + λ₁) + D_2/(1 + λ₂), the minimum of ‖X - D‖² + λ₁‖X_1‖² + λ₂‖X_2‖² (arXiv 2605.30640), with the
    blocks D_0 = P D Q (aligned), D_1 = P D (I - Q) + (I - P) D Q (partially aligned) and D_2 = (I - P) D (I - Q) (off),
    P and Q the projectors on V's k leading left and right directions. It keeps what `complement` removes. Where V = 0
    the update does not change.

    The paper attenuates by the relative energy of the blocks; its rule and its k are not known here. Here λ is a factor
    times the block's share of ‖D‖², both factors are 1 and k is that of `complement`: its results are not the paper's.
    X has rank 2r, and is stored exactly, by factors of twice the rank.

    Cost: that of `complement`. Compare with `shrink` and with `random_subspace`, both with `like: csulora`.

    Example:
        >>> CsuLora(partial=1, off=3, relative=False).raises_rank
        True
    """

    name: ClassVar[str] = "csulora"
    paper: ClassVar[str] = "https://arxiv.org/abs/2605.30640"
    raises_rank: ClassVar[bool] = True

    partial: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Factor of the penalty λ₁ on the part that only the outputs or only the inputs have in V's directions."""
    off: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Factor of the penalty λ₂ on the part outside of V's directions on both sides."""
    relative: bool = True
    """Whether a penalty is its factor times the part's share of ‖D‖²; if not, the factor itself."""

    def operator_for(self, delta: AlignmentDelta) -> Operator:
        """Return D ↦ X."""
        from stayaligned.algorithms.csulora import BlockAttenuation

        return BlockAttenuation(
            delta.subspace(rank=self.rank, energy=self.energy), self.partial, self.off, self.relative
        )
