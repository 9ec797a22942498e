"""One-shot patch: train the finished adapter further on one safety row."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from stayaligned.core.errors import StayalignedError
from stayaligned.defenses import ModelPair, PatchedAdapter
from stayaligned.defenses._training_patch import TrainingPatch

if TYPE_CHECKING:
    from stayaligned.weights.adapters import Adapter


class OneShot(TrainingPatch):
    """Train the finished adapter a few epochs further on one safety row.

    Plain supervised fine-tuning from the adapter's weights on the first `rows` alignment rows, with a new optimizer
    (arXiv 2601.01887). The paper searches the row among 256 candidates by a bilevel optimization against harmful and
    task rows, and finds a universal refusal; here it is the one that stands first in the file. Rank and configuration
    do not change. The learning rate and the number of epochs are the paper's, which patches full weights as well; a
    LoRA may need a larger rate.

    Cost: loading the model, and `rows` times `epochs` training steps. Compare with `random_change`, and with the same
    steps on a benign row, as `alignment_data`: where that lowers harm as much, the reason is not what the row says.

    Example:
        >>> OneShot(learning_rate=5e-4).rows
        1
    """

    name: ClassVar[str] = "one_shot"
    paper: ClassVar[str] = "https://arxiv.org/abs/2601.01887"
    needs_alignment_data: ClassVar[bool] = True

    rows: int = Field(default=1, ge=1)
    """Number of alignment rows, the first of the file, to train on."""
    epochs: float = Field(default=10.0, gt=0, allow_inf_nan=False)
    """Number of epochs."""
    learning_rate: float = Field(default=2e-5, gt=0, allow_inf_nan=False)
    """Learning rate."""

    def patch(self, adapter: Adapter, models: ModelPair) -> PatchedAdapter:
        """Train the adapter further on the first alignment rows."""
        from stayaligned.defenses.patching.changes import place_on_aligned, report_changes

        examples = models.require_alignment_examples(self.name)
        if len(examples) < self.rows:
            raise StayalignedError(
                f"{self.name}: rows is {self.rows}, but there are {len(examples)} alignment rows", hint="Lower rows."
            )
        layers, notes = place_on_aligned(adapter, models, self.name)
        return report_changes(adapter, self.train_further(adapter, examples[: self.rows], models), layers, notes)
