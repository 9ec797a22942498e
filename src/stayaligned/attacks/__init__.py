"""The contract of an attack: what an attacker does to the user's training data.

Each attack is one file in this package; the file's name is the attack's name.
"""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Sequence

from stayaligned.core.component import Component, Registry
from stayaligned.core.records import Example


class Attack(Component):
    """An attack on the training rows."""

    @abstractmethod
    def poison(self, examples: Sequence[Example], rng: random.Random) -> list[Example]:
        """Return the rows to fine-tune on; each row has its original `origin`.

        Args:
            examples: the clean rows of the task.
            rng: the only source of randomness: the same state gives the same rows.

        Raises:
            StayalignedError: if data that the attack needs is missing.
        """


ATTACKS: Registry[Attack] = Registry("attack", __name__, Attack)
