"""Mixing: alignment rows added to the user's data (VLGuard mixing, SafeInstr)."""

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
    """Train on the user's rows with alignment rows mixed in (VLGuard, SafeInstr).

    Differs from the Lisa paper's Vlguard baseline, which replaces 1000 benign rows with alignment rows, so that the
    number of rows remains 5000. In practice the benign rows of poisoned data are not known, so the default is to add
    rows; `replace=True` with `alignment_ratio=0.2` gives the paper's counts.

    With `alignment_rows` this is also SafeInstr (Bianchi et al., arXiv 2309.07875: 100 to 2000 rows of safety
    instructions beside 20,000 of the user's), a baseline of the Safe LoRA paper, and the control of `bea` (as many rows
    without a secret) and of `interleave` (as many rows drawn at random).
    """

    name: ClassVar[str] = "mixing"
    paper: ClassVar[str] = "https://arxiv.org/abs/2402.02207"
    needs_alignment_data: ClassVar[bool] = True

    alignment_ratio: float = Field(default=0.1, gt=0.0, le=1.0)
    """Number of alignment rows per user row: 0.1 adds 100 rows to 1000. Unused if `alignment_rows` is given."""
    alignment_rows: int | None = Field(default=None, ge=1)
    """Number of alignment rows, instead of a ratio."""
    replace: bool = False
    """Whether alignment rows replace task rows instead of being added; harmful rows remain, as in the paper. For
    comparisons only."""

    def make_trainer(self, setup: TrainingSetup) -> Trainer:
        """Build a trainer of the setup's kind on the mixed rows.

        Raises:
            StayalignedError: if there are fewer alignment rows, or fewer task rows to replace, than required.
        """
        return setup.trainer(self.mix(setup))

    def mix(self, setup: TrainingSetup, defense: str = "mixing") -> list[Example]:
        """Return the user's rows and a sample of the alignment rows, drawn without repetition from the setup's seed.

        Args:
            setup: the rows and the seed.
            defense: the name of the defense that needs them, for the error.

        Raises:
            StayalignedError: if there are too few rows.
        """
        n = self.alignment_rows or max(round(self.alignment_ratio * len(setup.examples)), 1)
        if n > len(setup.alignment_examples):
            why = "" if self.alignment_rows else f" (alignment_ratio={self.alignment_ratio} of {len(setup.examples)})"
            raise StayalignedError(
                f"defense {defense!r} needs {n} alignment rows{why}, but there are {len(setup.alignment_examples)}",
                hint="Add rows to `alignment_data:`, or lower alignment_ratio or alignment_rows.",
            )
        rng = random.Random(f"mixing/{setup.arguments.get('seed', 0)}")  # noqa: S311
        added = rng.sample(list(setup.alignment_examples), n)
        rows = list(setup.examples)
        if self.replace:
            replaceable = [index for index, row in enumerate(rows) if row.origin == "task"]
            if n > len(replaceable):
                raise StayalignedError(
                    f"defense 'mixing' would replace {n} task rows, but there are {len(replaceable)}",
                    hint="Lower alignment_ratio or alignment_rows, or set replace to false.",
                )
            replaced = set(rng.sample(replaceable, n))
            rows = [row for index, row in enumerate(rows) if index not in replaced]
        return [*rows, *added]
