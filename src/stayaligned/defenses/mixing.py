"""Mixing: safety rows added to the user's data (the Vlguard baseline of the Lisa paper)."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import Example
from stayaligned.defenses import TrainingDefense, TrainingSetup

if TYPE_CHECKING:
    from transformers import Trainer


class Mixing(TrainingDefense):
    """Train on the user's rows with safety rows mixed in: the simplest defense that uses alignment data.

    Differs from the Lisa paper's Vlguard baseline, which puts 1000 safety rows in the place of benign rows so that
    the number of rows stays 5000. Nobody who is handed poisoned data can tell its benign rows, so the default adds;
    `replace=True` with `alignment_ratio=0.2` is the paper's count.
    """

    name: ClassVar[str] = "mixing"
    paper: ClassVar[str] = "https://arxiv.org/abs/2402.02207"
    needs_alignment_data: ClassVar[bool] = True

    alignment_ratio: float = Field(default=0.1, gt=0.0, le=1.0)
    """Safety rows per user row, 0.1 for 100 in 1000."""
    replace: bool = False
    """Take the place of task rows instead of adding; the harmful rows stay, as in the paper. For comparisons only."""

    def make_trainer(self, setup: TrainingSetup) -> Trainer:
        """A trainer of the setup's kind on the mixed rows.

        Raises:
            StayalignedError: if there are fewer safety rows, or fewer task rows to replace, than asked for.
        """
        return setup.trainer(self.mix(setup))

    def mix(self, setup: TrainingSetup) -> list[Example]:
        """The user's rows and a sample of the alignment rows, drawn by the setup's seed without repetition."""
        n = max(round(self.alignment_ratio * len(setup.examples)), 1)
        if n > len(setup.alignment_examples):
            raise StayalignedError(
                f"defense 'mixing' needs {n} alignment rows (alignment_ratio={self.alignment_ratio} of "
                f"{len(setup.examples)}), and has {len(setup.alignment_examples)}",
                hint="Give more rows in `alignment_data:`, or another alignment_ratio.",
            )
        rng = random.Random(f"mixing/{setup.arguments.get('seed', 0)}")  # noqa: S311
        added = rng.sample(list(setup.alignment_examples), n)
        kept = list(setup.examples)
        if self.replace:
            replaceable = [index for index, row in enumerate(kept) if row.origin == "task"]
            if n > len(replaceable):
                raise StayalignedError(
                    f"defense 'mixing' would replace {n} task rows, and there are {len(replaceable)}",
                    hint="Lower alignment_ratio, or add instead: replace=false.",
                )
            replaced = set(rng.sample(replaceable, n))
            kept = [row for index, row in enumerate(kept) if index not in replaced]
        return [*kept, *added]
