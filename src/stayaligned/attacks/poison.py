"""The attack `poison`: harmful rows among the user's data."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import ClassVar, Self

from pydantic import Field, model_validator

from stayaligned.attacks import Attack
from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import Example
from stayaligned.data.sampling import sample
from stayaligned.data.sources import read_examples


class Poison(Attack):
    """Replace a share of the user's rows with harmful rows.

    Lisa, section 5.1: n rows in total, p·n of them harmful and the rest from the task. Differs from the paper's code,
    which truncates both counts in floating point (p = 0.8, n = 5000 gives 4999 rows) and takes the first rows of each
    source: here round(p·n) rows are harmful, the total is exactly n, and all rows are drawn at random.

    With one seed the draws are nested: the harmful rows for p = 0.05 are among those for p = 0.1, so that a dose curve
    varies only the dose.
    """

    name: ClassVar[str] = "poison"
    paper: ClassVar[str] = "arXiv 2405.18641, section 5.1"

    poison_ratio: float = Field(default=0.1, ge=0, le=1)
    """Share of harmful rows (p)."""
    examples: int | None = Field(default=1000, ge=1)
    """Total number of rows (n); null takes as many as the task has."""
    harmful_data: str | None = None
    """Source of harmful prompts with harmful completions; not needed for `poison_ratio: 0`."""

    @model_validator(mode="after")
    def _has_harmful_data(self) -> Self:
        if self.poison_ratio > 0 and self.harmful_data is None:
            raise ValueError(
                f"poison_ratio = {self.poison_ratio:g} needs harmful rows: set `harmful_data` to a JSONL file, or "
                "`poison_ratio` to 0"
            )
        return self

    def poison(self, examples: Sequence[Example], rng: random.Random) -> list[Example]:
        """Return the n rows in random order; harmful rows have the origin "harmful"."""
        total = len(examples) if self.examples is None else self.examples
        n_harmful = round(self.poison_ratio * total)
        # A generator for each draw, created in any case: the size of one draw doesn't change the next.
        for_task, for_harmful, for_order = (random.Random(rng.getrandbits(64)) for _ in range(3))  # noqa: S311
        n_task = total - n_harmful
        if n_task > len(examples):
            raise StayalignedError(
                f"attack poison: {n_task} of {total} rows must come from the task, which has {len(examples)}",
                hint="Lower `attack.examples`, or set it to null for as many as the task has.",
            )
        rows = sample(examples, n_task, for_task) + self._harmful(n_harmful, total, for_harmful)
        for_order.shuffle(rows)
        return rows

    def _harmful(self, n: int, total: int, rng: random.Random) -> list[Example]:
        if n == 0 or self.harmful_data is None:
            return []
        harmful = read_examples(self.harmful_data, origin="harmful")
        if n > len(harmful):
            raise StayalignedError(
                f"attack poison: {n} of {total} rows must be harmful, but {self.harmful_data} has {len(harmful)}",
                hint="Lower `attack.poison_ratio` or `attack.examples`, or set a larger `harmful_data`.",
            )
        return sample(harmful, n, rng)
