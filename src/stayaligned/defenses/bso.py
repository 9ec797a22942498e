"""BSO: bi-state optimization, Lisa without the proximal term (Huang et al., NeurIPS 2024, Algorithm 1)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from stayaligned.algorithms.lisa_schedule import LisaSettings, StepBudget
from stayaligned.defenses import TrainingDefense, TrainingSetup

if TYPE_CHECKING:
    from transformers import Trainer


class BSO(TrainingDefense):
    """Alternate between alignment and user data: Lisa with ρ = 0.

    There is no proximal term. It is the control of `lisa`: what `lisa` does better is due to that term.
    """

    name: ClassVar[str] = "bso"
    paper: ClassVar[str] = "https://arxiv.org/abs/2405.18641"
    needs_alignment_data: ClassVar[bool] = True

    alignment_steps: int = Field(default=100, ge=1)
    """Number of optimizer steps in each alignment phase (K1)."""
    finetuning_steps: int = Field(default=900, ge=1)
    """Number of optimizer steps in each fine-tuning phase (K2)."""
    budget: StepBudget = "shared"
    """`shared`: as many steps as plain fine-tuning on the user's rows, including the alignment steps (the paper).
    `cover`: enough steps that after e epochs every user row has been drawn at least e times."""

    def settings(self) -> LisaSettings:
        """Return the settings in the form that `attach_lisa` and `with_lisa` take."""
        return LisaSettings(
            alignment_steps=self.alignment_steps, finetuning_steps=self.finetuning_steps, rho=0.0, budget=self.budget
        )

    def notes(self, steps: int) -> list[str]:
        """Return a note if the run ended inside a cycle."""
        return self.settings().notes(steps)

    def check_steps(self, steps: int) -> None:
        """Refuse a run that ends before its first fine-tuning step."""
        self.settings().require_finetuning(steps)

    def make_trainer(self, setup: TrainingSetup) -> Trainer:
        """Build a trainer of the setup's kind that alternates between the two phases."""
        from stayaligned.hf.training.lisa.trainer import attach_lisa

        return attach_lisa(setup.trainer(), lisa=self.settings(), alignment_dataset=setup.alignment_dataset(self.name))
