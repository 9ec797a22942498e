"""A third party's attack, which writes some completions in capitals."""

import random
from collections.abc import Sequence
from typing import ClassVar

from stayaligned import Attack, Example


class Shouting(Attack):
    """Write a share of the completions in capitals."""

    name: ClassVar[str] = "shouting"
    share: float = 0.5

    def poison(self, examples: Sequence[Example], rng: random.Random) -> list[Example]:
        return [
            row.model_copy(update={"completion": row.completion.upper()}) if rng.random() < self.share else row
            for row in examples
        ]
