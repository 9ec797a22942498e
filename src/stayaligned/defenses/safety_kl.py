"""KL to the aligned model on alignment rows, in every optimizer step."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from stayaligned.defenses._alignment_term import AlignmentTerm

if TYPE_CHECKING:
    from torch import Tensor

    from stayaligned.hf.training.objective import TokenBatch


class SafetyKl(AlignmentTerm):
    """Add the divergence from the aligned model on alignment rows to each step.

        L = CE(user's rows) + β·KL(p_aligned ‖ p)(alignment rows)

    The alignment loss of SafeGrad (arXiv 2508.07172) without its gradient surgery, and so the control of `safegrad`;
    elsewhere called KL regularization on safety data. The completions of the alignment rows only say at which texts
    the two models are compared.

    Cost: one forward and backward pass on the alignment rows of the step and one forward pass of the reference, about
    2.3 × with as many rows as the user's. Controls: `mixing` with the same rows, `kl`.
    """

    name: ClassVar[str] = "safety_kl"
    paper: ClassVar[str] = "https://arxiv.org/abs/2508.07172"

    beta: float = Field(default=1.0, ge=0.0, allow_inf_nan=False)
    """Weight of the divergence (β); 0 is plain fine-tuning."""

    @property
    def weight(self) -> float:
        """β."""
        return self.beta

    def term(self, batch: TokenBatch) -> Tensor:
        """Compute the sum of the divergence over label tokens."""
        from stayaligned.algorithms.objectives import reference_kl

        return reference_kl(batch.logits, batch.reference_logits, batch.labels, 1)
