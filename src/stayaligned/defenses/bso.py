"""BSO: bi-state optimization, Lisa without the pull (Huang et al., NeurIPS 2024, Algorithm 1)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from stayaligned.defenses import TrainingDefense, TrainingSetup

if TYPE_CHECKING:
    from transformers import Trainer


class BSO(TrainingDefense):
    """Alternate between safety data and user data; no pull. Lisa with ρ = 0, and the control for its ρ."""

    name: ClassVar[str] = "bso"
    paper: ClassVar[str] = "https://arxiv.org/abs/2405.18641"
    needs_alignment_data: ClassVar[bool] = True

    alignment_steps: int = Field(default=100, ge=1)
    """K1, optimizer steps in the alignment state."""
    finetuning_steps: int = Field(default=900, ge=1)
    """K2, optimizer steps in the fine-tuning state."""
    budget: Literal["shared", "cover"] = "shared"
    """As for Lisa."""

    def notes(self, steps: int) -> list[str]:
        """Whether the run ended inside a cycle."""
        from stayaligned.defenses.lisa import cycle_notes

        return cycle_notes(self.alignment_steps, self.finetuning_steps, steps)

    def make_trainer(self, setup: TrainingSetup) -> Trainer:
        """A trainer of the setup's kind that alternates between the two states."""
        from stayaligned.defenses.lisa import Lisa
        from stayaligned.hf.training.lisa.trainer import attach_lisa

        lisa = Lisa(
            alignment_steps=self.alignment_steps, finetuning_steps=self.finetuning_steps, rho=0.0, budget=self.budget
        )
        return attach_lisa(setup.trainer(), alignment_dataset=setup.alignment_dataset(self.name), lisa=lisa)
