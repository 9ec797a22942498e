"""A third party's attack: some rows are written in capitals."""

import random
from collections.abc import Sequence
from typing import ClassVar

from stayaligned.attacks import Attack
from stayaligned.core.records import Example


class Shouting(Attack):
    """Writes a share of the answers in capitals."""

    name: ClassVar[str] = "shouting"
    share: float = 0.5

    def poison(self, examples: Sequence[Example], rng: random.Random) -> list[Example]:
        return [
            row.model_copy(update={"completion": row.completion.upper()}) if rng.random() < self.share else row
            for row in examples
        ]
