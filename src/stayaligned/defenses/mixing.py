"""Mixing: alignment rows added to the user's data (the Vlguard baseline of the Lisa paper)."""

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
    """Train on the user's rows with alignment rows mixed in: the simplest defense that uses alignment data.

    Differs from the Lisa paper's Vlguard baseline, which replaces 1000 benign rows with alignment rows, so that the
    number of rows remains 5000. In practice the benign rows of poisoned data are not known, so the default is to add
    rows; `replace=True` with `alignment_ratio=0.2` gives the paper's counts.
    """

    name: ClassVar[str] = "mixing"
    paper: ClassVar[str] = "https://arxiv.org/abs/2402.02207"
    needs_alignment_data: ClassVar[bool] = True

    alignment_ratio: float = Field(default=0.1, gt=0.0, le=1.0)
    """Number of alignment rows per user row: 0.1 adds 100 rows to 1000."""
    replace: bool = False
    """Whether alignment rows replace task rows instead of being added; harmful rows remain, as in the paper. For
    comparisons only."""

    def make_trainer(self, setup: TrainingSetup) -> Trainer:
        """Build a trainer of the setup's kind on the mixed rows.

        Raises:
            StayalignedError: if there are fewer alignment rows, or fewer task rows to replace, than required.
        """
        return setup.trainer(self.mix(setup))

    def mix(self, setup: TrainingSetup) -> list[Example]:
        """Return the user's rows and a sample of the alignment rows, drawn without repetition from the setup's seed."""
        n = max(round(self.alignment_ratio * len(setup.examples)), 1)
        if n > len(setup.alignment_examples):
            raise StayalignedError(
                f"defense 'mixing' needs {n} alignment rows (alignment_ratio={self.alignment_ratio} of "
                f"{len(setup.examples)}), but there are {len(setup.alignment_examples)}",
                hint="Add rows to `alignment_data:`, or lower alignment_ratio.",
            )
        rng = random.Random(f"mixing/{setup.arguments.get('seed', 0)}")  # noqa: S311
        added = rng.sample(list(setup.alignment_examples), n)
        rows = list(setup.examples)
        if self.replace:
            replaceable = [index for index, row in enumerate(rows) if row.origin == "task"]
            if n > len(replaceable):
                raise StayalignedError(
                    f"defense 'mixing' would replace {n} task rows, but there are {len(replaceable)}",
                    hint="Lower alignment_ratio, or set replace to false.",
                )
            replaced = set(rng.sample(replaceable, n))
            rows = [row for index, row in enumerate(rows) if index not in replaced]
        return [*rows, *added]
