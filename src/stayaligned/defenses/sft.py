"""Plain supervised fine-tuning: no defense, the honest control of every other one."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from stayaligned.defenses import TrainingDefense, TrainingSetup

if TYPE_CHECKING:
    from transformers import Trainer


class SFT(TrainingDefense):
    """Fine-tune on the user's rows and nothing else: what every defense is compared with."""

    name: ClassVar[str] = "sft"

    def make_trainer(self, setup: TrainingSetup) -> Trainer:
        """The setup's own trainer."""
        return setup.trainer()
