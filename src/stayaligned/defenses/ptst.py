"""PTST: train without a safety prompt, test with one (Lyu et al., NeurIPS 2024)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from stayaligned.core.errors import StayalignedError
from stayaligned.defenses import TrainingSetup
from stayaligned.defenses._served import ServedDefense

if TYPE_CHECKING:
    from transformers import Trainer


class PureTuningSafeTesting(ServedDefense):
    """Train without a safety prompt, and serve the model with one.

    The weights are those of plain fine-tuning, bit for bit; only the prompts after training differ.

    Differs from the paper in the prompt's words: it uses Llama 2's default system prompt, which its authors' models
    were aligned with. The default here is a text of our own; set `prompt` to the one that your model knows.

    Cost: none in training; the prompt's tokens in every conversation. Compare with `sft`, and with the aligned model
    asked with the same prompt: what the prompt alone does is no merit of the training.
    """

    name: ClassVar[str] = "ptst"
    paper: ClassVar[str] = "https://arxiv.org/abs/2402.18540"

    prompt: str = Field(
        default="You are a considerate and truthful assistant. Help as well as you can with every harmless request. If "
        "an answer could help to hurt people or to break the law, say politely that you can't give it.",
        min_length=1,
    )
    """The safety prompt, as the system turn after training; in front of a conversation's own system prompt."""

    def system_text(self) -> str:
        """Return the safety prompt."""
        return self.prompt

    def make_trainer(self, setup: TrainingSetup) -> Trainer:
        """Build a trainer of the setup's kind for plain fine-tuning.

        Raises:
            StayalignedError: if a row has the safety prompt already, or the template shows no system turns.
        """
        tuned = [row.id for row in setup.examples for turn in row.prompt if self.prompt in turn.content]
        if tuned:
            raise StayalignedError(
                f"defense 'ptst': {len(tuned)} of {len(setup.examples)} training rows have the safety prompt already "
                f"(first: {tuned[0]!r}), so the tuning would not be pure",
                hint="Remove it from the rows, or set another `prompt`.",
            )
        self.require_readable(setup, "prompt")
        return setup.trainer()
