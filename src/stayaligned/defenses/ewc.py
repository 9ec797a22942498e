"""EWC: elastic weight consolidation (Kirkpatrick and others, PNAS 2017)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from stayaligned.defenses import TrainingDefense, TrainingSetup

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Trainer

    from stayaligned.hf.training.objective import ObjectiveRun


class Ewc(TrainingDefense):
    """Hold each weight near its start, as far as the alignment rows depend on it.

        L = CE(user's rows) + λ/2·Σ F (w − w₀)²,    F = mean over alignment rows of (∂ log p(answer) / ∂w)² at w₀

    A fresh LoRA has B = 0, where the derivative by A is 0: F is 0 for A, and only B is held, near 0. That is exact for
    the weights that are trained, and blind to what A does once B has moved. With `lora: null` all weights are held.

    Differences: Lisa's baseline continues to train the LoRA that the model was aligned with, so that neither factor is
    0, sums squared gradients of batches and takes λ = 0.001 without the ½. The Fisher here is the empirical one, of the
    answers in the rows; the paper's is of the model's own. The paper's λ depends on the task: 1 is ours.

    Cost: a forward and a backward pass of each alignment row at the beginning, and memory for two copies of the trained
    weights, which checkpoints hold. Control: `uniform: true`, the same strength for all weights (the mean of F).
    """

    name: ClassVar[str] = "ewc"
    paper: ClassVar[str] = "https://arxiv.org/abs/1612.00796"
    needs_alignment_data: ClassVar[bool] = True

    strength: float = Field(default=1.0, ge=0.0, allow_inf_nan=False)
    """Weight of the penalty (λ); 0 is plain fine-tuning."""
    uniform: bool = False
    """Whether all weights are held alike, with the mean of F: the control of the choice of weights."""

    def make_trainer(self, setup: TrainingSetup) -> Trainer:
        """Build a trainer of the setup's kind that adds the gradient of the penalty to each step.

        Raises:
            StayalignedError: if there are no alignment rows, or the training is not supported.
        """
        from stayaligned.algorithms.objectives import weighted_drift
        from stayaligned.hf.training.objective import Objective, attach_objective, empirical_fisher

        trainer = setup.trainer()
        rows = setup.alignment_rows(trainer, self.name)

        def start(run: ObjectiveRun) -> dict[str, Tensor]:
            fisher = empirical_fisher(run, rows.all_rows(trainer, run.model))
            if self.uniform:
                entries = sum(value.numel() for value in fisher.values())
                mean = sum(value.sum().item() for value in fisher.values()) / entries
                fisher = {name: value.fill_(mean) for name, value in fisher.items()}
            start = {f"start/{name}": weight.detach().clone() for name, weight in run.params.items()}
            return start | {f"fisher/{name}": value for name, value in fisher.items()}

        def penalty(run: ObjectiveRun) -> Tensor:
            start, fisher = ({name: run.state[f"{kind}/{name}"] for name in run.params} for kind in ("start", "fisher"))
            return self.strength * weighted_drift(run.params, start, fisher)

        return attach_objective(trainer, Objective(self.name, start=start, penalty=penalty))
