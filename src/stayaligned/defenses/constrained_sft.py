"""Constrained fine-tuning: the first tokens of an answer stay near the aligned model (Qi and others, ICLR 2025)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from stayaligned.defenses import TrainingDefense, TrainingSetup

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Trainer

    from stayaligned.hf.training.objective import TokenBatch


class ConstrainedSFT(TrainingDefense):
    """Learn a token the less, the more its probability has risen; the first most so.

        L = −Σ_t (2/β_t)·log σ(β_t·(log p − log p_aligned))        (equation 3)

    Its gradient is the cross-entropy's with the weight 2(1 − σ(β_t(log p − log p_aligned))), 1 at the start. As in the
    published code the weight is a constant of at least 0.001, and the logged loss is the weighted cross-entropy. That
    code also sets what is left to `training` here: `adam_beta1: 0.5`, for some attacks `warmup_steps: 10`, and no
    dropout. Differences: p_aligned is of the model without its adapter; the mean is over the tokens of the optimizer
    step. A router's loss is not part of it.

    Cost: one more forward pass (with `trainer: sft` two, because TRL's computes no logits). Control: `kl`, and
    `early: 0.1` with `first: 0.1`, the same strength for all tokens.
    """

    name: ClassVar[str] = "constrained_sft"
    paper: ClassVar[str] = "https://arxiv.org/abs/2406.05946"

    first: float = Field(default=0.5, gt=0.0, allow_inf_nan=False)
    """Strength of the constraint on an answer's first token (β_1)."""
    early: float = Field(default=2.0, gt=0.0, allow_inf_nan=False)
    """Strength of the constraint on the tokens after the first, up to `early_tokens` (β_2 …)."""
    later: float = Field(default=0.1, gt=0.0, allow_inf_nan=False)
    """Strength of the constraint on all later tokens."""
    early_tokens: int = Field(default=5, ge=0)
    """Number of tokens at the start of an answer, the first included, that are constrained more than the later ones."""

    def make_trainer(self, setup: TrainingSetup) -> Trainer:
        """Build a trainer of the setup's kind with this loss.

        Raises:
            StayalignedError: if the model has no adapter, or the training is not supported.
        """
        from stayaligned.algorithms.objectives import TokenStrengths, constrained_loss
        from stayaligned.hf.training.objective import Objective, attach_objective

        strengths = TokenStrengths(self.first, self.early, self.later, self.early_tokens)

        def loss(_: Tensor, batch: TokenBatch) -> Tensor:
            return batch.mean(constrained_loss(batch.logits, batch.reference_logits, batch.labels, strengths))

        return attach_objective(setup.trainer(), Objective(self.name, user_loss=loss, needs_reference=True))
