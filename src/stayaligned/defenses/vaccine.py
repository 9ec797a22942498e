"""Vaccine: alignment that withstands perturbed hidden states (Huang and others, NeurIPS 2024)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from stayaligned.core.errors import StayalignedError
from stayaligned.defenses import TrainingDefense, TrainingSetup

if TYPE_CHECKING:
    from transformers import Trainer


class Vaccine(TrainingDefense):
    """Train on alignment rows under perturbed hidden states, then on the user's.

        steps 1 … K:  min_w max_‖e‖≤ρ CE(alignment rows; attention outputs + e),   e = ρ·g/‖g‖
        afterwards:   min_w CE(user's rows)

    with g the gradient of the loss by the outputs of all attention layers, and ‖g‖ over all layers. Differences: the
    paper aligns a base model this way and publishes it; here the aligned model is trained further, by the same LoRA
    that then learns the user's rows (the "single LoRA" of Safe LoRA's appendix), with one optimizer and learning rate
    schedule. The perturbation is of each micro-batch in each process. As in the published code, e is added at once to
    all layers, from the gradients of one unperturbed pass.

    Cost: two forward and two backward passes in each of the first K steps. Control: `rho: 0`, the same steps on
    alignment rows without the perturbation; and `bso`.
    """

    name: ClassVar[str] = "vaccine"
    paper: ClassVar[str] = "https://arxiv.org/abs/2402.01109"
    needs_alignment_data: ClassVar[bool] = True

    alignment_steps: int = Field(default=100, ge=1)
    """Number of optimizer steps on alignment rows at the beginning (K). They are added to those of the user's rows,
    unless `training.max_steps` is set, which counts both."""
    rho: float = Field(default=2.0, ge=0.0, allow_inf_nan=False)
    """Norm of the perturbation (ρ); 2 in the published example, for a batch of a 7B model's hidden states."""

    def run_steps(self, steps: int) -> int:
        """Return the steps of both phases."""
        return self.alignment_steps + steps

    def check_steps(self, steps: int) -> None:
        """Refuse a run that ends before its first step on the user's rows."""
        if steps <= self.alignment_steps:
            raise StayalignedError(
                f"defense 'vaccine' takes the first {self.alignment_steps} steps on alignment rows, and so none on the "
                f"user's in a run of {steps}",
                hint="Lower alignment_steps, or raise `training.max_steps`.",
            )

    def make_trainer(self, setup: TrainingSetup) -> Trainer:
        """Build a trainer of the setup's kind with the two phases.

        Raises:
            StayalignedError: if there are no alignment rows, the model has no attention layers, or the run ends before
                its first step on the user's rows.
        """
        from stayaligned.algorithms.lisa_schedule import LisaSettings
        from stayaligned.hf.training.lisa.trainer import attach_lisa
        from stayaligned.hf.training.vaccine import PerturbedLoss

        trainer = setup.trainer()
        if trainer.args.max_steps <= 0:
            rows: Any = trainer.train_dataset
            per_epoch = math.ceil(len(rows) / trainer.get_total_train_batch_size(trainer.args))
            trainer.args.max_steps = self.run_steps(math.ceil(per_epoch * trainer.args.num_train_epochs))
        self.check_steps(trainer.args.max_steps)
        phases = LisaSettings(
            alignment_steps=self.alignment_steps,
            finetuning_steps=trainer.args.max_steps - self.alignment_steps,
            rho=0.0,
        )
        alignment = setup.alignment_dataset(self.name)
        loss = PerturbedLoss(trainer, self.rho)
        return attach_lisa(trainer, lisa=phases, alignment_dataset=alignment, alignment_loss=loss)
