"""KL-anchored fine-tuning: a divergence from the aligned model on the user's rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from stayaligned.defenses import TrainingDefense, TrainingSetup

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Trainer

    from stayaligned.hf.training.objective import TokenBatch


class Kl(TrainingDefense):
    """Add to the user's loss the divergence from the aligned model, on the same rows.

        L = CE + β·KL(p_aligned ‖ p), mean over the label tokens, with the full vocabulary

    The "SFT + KL" form of Anchored SFT (arXiv 2509.23753), which NeMo-RL and LLaMA-Factory call ASFT (not `asft`, which
    is AsFT). Differences: ASFT also weights the cross-entropy of a token by its probability (DFT), which is
    `training.loss_type: dft` of SFTTrainer; β = 0.1 is LLaMA-Factory's. The aligned model is the model
    without its adapter, so there is no second model in memory.

    Cost: one more forward pass (with `trainer: sft` two, because TRL's computes no logits). Control: `sft` with fewer
    steps or a lower learning rate, at the same accuracy.
    """

    name: ClassVar[str] = "kl"
    paper: ClassVar[str] = "https://arxiv.org/abs/2509.23753"

    beta: float = Field(default=0.1, ge=0.0, allow_inf_nan=False)
    """Weight of the divergence (β); 0 is plain fine-tuning."""

    def make_trainer(self, setup: TrainingSetup) -> Trainer:
        """Build a trainer of the setup's kind whose loss has the divergence.

        Raises:
            StayalignedError: if the model has no adapter, or the training is not supported.
        """
        from stayaligned.algorithms.objectives import reference_kl
        from stayaligned.hf.training.objective import Objective, attach_objective

        def loss(host: Tensor, batch: TokenBatch) -> Tensor:
            divergence = reference_kl(batch.logits, batch.reference_logits, batch.labels, 1)
            return host + self.beta * batch.mean(divergence)

        user_loss = loss if self.beta else None
        return attach_objective(setup.trainer(), Objective(self.name, user_loss=user_loss, needs_reference=True))
