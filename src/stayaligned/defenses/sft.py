"""Plain supervised fine-tuning: no defense, the control of every defense."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from stayaligned.defenses import TrainingDefense, TrainingSetup

if TYPE_CHECKING:
    from transformers import Trainer


class SFT(TrainingDefense):
    """Fine-tune on the user's rows and nothing else: the control of every defense."""

    name: ClassVar[str] = "sft"

    def make_trainer(self, setup: TrainingSetup) -> Trainer:
        """Build the setup's plain trainer."""
        return setup.trainer()
