"""SafeGrad: gradient surgery against the alignment gradient (Yi and others, 2025)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from stayaligned.defenses._alignment_term import AlignmentTerm

if TYPE_CHECKING:
    from torch import Tensor

    from stayaligned.hf.training.objective import TokenBatch


class SafeGrad(AlignmentTerm):
    """Remove from each gradient what works against the alignment loss (SafeGrad).

        g ← g − (g·g_s / ‖g_s‖²) g_s  if g·g_s < 0;    g ← g + ρ·g_s

    with g_s the gradient of KL(p_aligned ‖ p) on the step's alignment rows, and g, g_s of all trained weights as one
    vector (equations 3 and 4, algorithm 1). Differences: g is that of the optimizer step, not of a micro-batch; the
    aligned model is the model without its adapter, so for a fresh LoRA g_s is 0 up to rounding in the first
    step. The divergence is the mean over label tokens. Equations and ρ = 1 were checked in another library's
    port of the method (SafeTune), because the authors' code was not available to us.

    Cost: as `safety_kl`, about 2.3 ×, and memory for a second gradient. Control: `safety_kl`, the same without the
    surgery.
    """

    name: ClassVar[str] = "safegrad"
    paper: ClassVar[str] = "https://arxiv.org/abs/2508.07172"

    rho: float = Field(default=1.0, ge=0.0, allow_inf_nan=False)
    """Weight of the alignment gradient that is added (ρ); 0 for the surgery alone."""

    @property
    def weight(self) -> float:
        """ρ."""
        return self.rho

    def term(self, batch: TokenBatch) -> Tensor:
        """Compute the sum of the divergence over label tokens."""
        from stayaligned.algorithms.objectives import reference_kl

        return reference_kl(batch.logits, batch.reference_logits, batch.labels, 1)

    def combine(self, gradient: Sequence[Tensor], alignment: Sequence[Tensor]) -> None:
        """Remove the conflicting component, then add ρ times the alignment gradient."""
        from stayaligned.algorithms.objectives import remove_conflict_

        remove_conflict_(gradient, alignment)
        super().combine(gradient, alignment)
