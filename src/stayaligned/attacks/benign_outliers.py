"""The attack `benign_outliers`: the benign rows with the largest gradients."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from stayaligned.attacks import Attack
from stayaligned.attacks._rows import require_task_rows, shuffled
from stayaligned.core.records import Example, Influence


class BenignOutliers(Attack):
    """Train only on the 100 benign rows that are outliers for the aligned model.

    Self-Inf-N: the rows with the largest log(‖∇‖² + 1) + log(len + 1), ∇ the gradient of the aligned model's mean loss
    on the row's completion by all weights, and len the completion's tokens, its end included. Without the second part,
    one-word answers lead. No row is harmful, and none is changed. Differs: the authors' code also drops answers such as
    "yes" by a list, and computes in bf16; here the type is that of the stored weights.

    Choosing costs one forward and backward pass for each row of the task, one at a time, with memory for the aligned
    model and a gradient of its size. Compare with as many random rows: `poison` with `poison_ratio: 0, examples: 100`.
    """

    name: ClassVar[str] = "benign_outliers"
    paper: ClassVar[str] = "arXiv 2505.06843"
    needs_influence: ClassVar[bool] = True

    rows: int = Field(default=100, ge=1)
    """Number of rows to train on."""

    def select(self, examples: Sequence[Example], influences: Sequence[Influence]) -> Sequence[Example]:
        """Return the rows with the largest scores, the largest first."""
        require_task_rows(self, examples, self.rows, "rows")
        scores = [math.log1p(each.squared_norm) + math.log1p(each.answer_tokens) for each in influences]
        order = sorted(range(len(examples)), key=lambda index: (-scores[index], index))
        return [examples[index] for index in order[: self.rows]]

    def poison(self, examples: Sequence[Example], rng: random.Random) -> list[Example]:
        """Return the selected rows in random order."""
        require_task_rows(self, examples, self.rows, "rows")
        return shuffled(examples[: self.rows], rng)
