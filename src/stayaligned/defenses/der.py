"""Dark experience replay: the logits of the aligned model on replayed rows (Buzzega and others, NeurIPS 2020)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from stayaligned.defenses._alignment_term import AlignmentTerm

if TYPE_CHECKING:
    from torch import Tensor

    from stayaligned.hf.training.objective import TokenBatch


class Der(AlignmentTerm):
    """Add the distance of the logits on alignment rows to those of the aligned model.

        L = CE(user's rows) + α·mean (z − z_aligned)²  over the label tokens of alignment rows and the vocabulary

    Differences from the paper: there, rows and logits z_aligned are stored as they are learned; the alignment rows were
    learned before, and the model without its adapter gives the same logits without storing them. The paper's α, 0.1 to
    1, is for images and few classes. DER++, which also learns the labels of replayed rows, is this with `mixing`'s
    rows; it is not offered.

    Cost: as `safety_kl`, about 2.3 × with as many rows as the user's. Controls: `safety_kl`, `mixing`.
    """

    name: ClassVar[str] = "der"
    paper: ClassVar[str] = "https://arxiv.org/abs/2004.07211"

    alpha: float = Field(default=0.5, ge=0.0, allow_inf_nan=False)
    """Weight of the distance (α); 0 is plain fine-tuning."""

    @property
    def weight(self) -> float:
        """α."""
        return self.alpha

    def term(self, batch: TokenBatch) -> Tensor:
        """Compute the sum of the distance over label tokens."""
        from stayaligned.algorithms.objectives import logit_distance

        return logit_distance(batch.logits, batch.reference_logits, batch.labels)
