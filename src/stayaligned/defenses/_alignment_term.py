"""The contract of the defenses that add a loss on alignment rows to every optimizer step."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from stayaligned.defenses import TrainingDefense, TrainingSetup

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Trainer

    from stayaligned.hf.training.objective import TokenBatch


class AlignmentTerm(TrainingDefense):
    """A defense that compares the model with the aligned model on the alignment rows of every optimizer step.

    The aligned model is the model without its adapter. The rows of step t are a function of the seed and t, in a new
    order in each pass.
    """

    needs_alignment_data: ClassVar[bool] = True

    alignment_rows_per_step: int | None = Field(default=None, ge=1)
    """Number of alignment rows in each optimizer step; None for as many as the user's."""

    @property
    @abstractmethod
    def weight(self) -> float:
        """The factor of the term; 0 leaves plain fine-tuning."""

    @abstractmethod
    def term(self, batch: TokenBatch) -> Tensor:
        """Compute the sum of the loss over the label tokens of a batch of alignment rows."""

    def combine(self, gradient: Sequence[Tensor], alignment: Sequence[Tensor]) -> None:
        """Change the user's gradient by the term's, in place; both are of the optimizer step."""
        import torch

        torch._foreach_add_(list(gradient), list(alignment), alpha=self.weight)  # pyright: ignore[reportPrivateUsage]

    def make_trainer(self, setup: TrainingSetup) -> Trainer:
        """Build a trainer of the setup's kind that adds the gradient of the term to each step.

        Raises:
            StayalignedError: if there are no alignment rows, the model has no adapter, or the training is unsupported.
        """
        from stayaligned.hf.training.objective import Objective, attach_objective

        trainer = setup.trainer()
        objective = Objective(
            self.name,
            alignment_rows=setup.alignment_rows(trainer, self.name, self.alignment_rows_per_step),
            alignment_loss=lambda batch: batch.mean(self.term(batch)),
            combine=self.combine,
            needs_reference=True,
        )
        return attach_objective(trainer, objective)
