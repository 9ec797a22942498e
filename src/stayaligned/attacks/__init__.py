"""The contract of an attack: what a harmful fine-tuning attacker does to the user's data.

One file per attack beside this one; the file's name is the attack's name.
"""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Sequence

from stayaligned.core.component import Component, Registry
from stayaligned.core.records import Example


class Attack(Component):
    """A harmful fine-tuning attack on the training rows."""

    @abstractmethod
    def poison(self, examples: Sequence[Example], rng: random.Random) -> list[Example]:
        """The rows that the fine-tuning party receives; each keeps its `origin`.

        Args:
            examples: the clean task rows.
            rng: the only source of randomness; the same state gives the same rows.

        Raises:
            StayalignedError: if the attack lacks the data it needs.
        """


ATTACKS: Registry[Attack] = Registry("attack", __name__, Attack)
