"""EMA: an exponential moving average of the weights (Kim and others, COLM 2025)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from stayaligned.defenses import TrainingDefense, TrainingSetup

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Trainer

    from stayaligned.hf.training.objective import ObjectiveRun


class Ema(TrainingDefense):
    """Train as usual, and save the average of the weights along the way.

        w̄ ← (1 − a)·w̄ + a·w  after each optimizer step, from w̄ = the initial weights

    The average is of the trained weights; of a LoRA, of the factors A and B. It is what is saved at the end and
    evaluated; training itself, `watch` and `eval` during it see the weights w. The average is part of every checkpoint.
    The paper's own coefficient could not be checked; 0.01 is ours, and too small for runs of fewer than some hundreds
    of steps, which then hardly leave the aligned model: (1 − a)ᵗ of the initial weights is left after t steps.

    Cost: one copy of the trained weights. Control: `sft` with a lower learning rate, at the same accuracy.
    """

    name: ClassVar[str] = "ema"
    paper: ClassVar[str] = "https://arxiv.org/abs/2508.12531"

    rate: float = Field(default=0.01, gt=0.0, le=1.0)
    """Share of the current weights in each step of the average (a); 1 is plain fine-tuning."""

    def make_trainer(self, setup: TrainingSetup) -> Trainer:
        """Build a trainer of the setup's kind whose weights are replaced by their average when training has ended.

        Raises:
            StayalignedError: if the training is not supported.
        """
        from stayaligned.hf.training.objective import Objective, attach_objective

        def start(run: ObjectiveRun) -> dict[str, Tensor]:
            return {name: weight.detach().clone() for name, weight in run.params.items()}

        def average(run: ObjectiveRun) -> None:
            for name, weight in run.params.items():
                run.state[name].lerp_(weight, self.rate)

        def replace(run: ObjectiveRun) -> None:
            for name, weight in run.params.items():
                weight.copy_(run.state[name])

        objective = Objective(self.name, start=start, after_step=average, finish=replace, replaces_weights=True)
        return attach_objective(setup.trainer(), objective)
