"""The contract of an attack: what an attacker does to the user's training data, and to the questions asked afterwards.

Each attack is one file in this package; the file's name is the attack's name.
"""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import ClassVar

from stayaligned.core.component import Component, Registry
from stayaligned.core.records import Example, Influence, Message


class Attack(Component):
    """An attack on the training rows, and on the harmful prompts that the attacker asks after training.

    An attack whose rows teach a trigger sets `has_trigger` and overrides `trigger`. Harm is then measured twice: on the
    plain prompts, and on the prompts with the trigger.
    """

    has_trigger: ClassVar[bool] = False
    """Whether `trigger` changes a prompt."""
    ordered: ClassVar[bool] = False
    """Whether the rows must be learned once and in their order, because the attack has stages; training with another
    number of epochs is an error before it starts."""
    needs_influence: ClassVar[bool] = False
    """Whether `select` uses the influence of each row on the aligned model; computing it takes a forward and a backward
    pass for each row."""

    def select(self, examples: Sequence[Example], influences: Sequence[Influence]) -> Sequence[Example]:
        """Return the clean rows that `poison` gets, by their influence; called if `needs_influence`.

        Args:
            examples: the clean rows of the task.
            influences: what each of them would do to the aligned model.
        """
        del influences
        return examples

    def missing(self) -> Iterator[str]:
        """Yield what the settings lack to poison data, such as a source; nothing by default.

        A model that is only evaluated under the attack's trigger needs none of it.
        """
        yield from ()

    @abstractmethod
    def poison(self, examples: Sequence[Example], rng: random.Random) -> list[Example]:
        """Return the rows to fine-tune on; each row has its original `origin`.

        Args:
            examples: the clean rows of the task.
            rng: the only source of randomness: the same state gives the same rows.

        Raises:
            StayalignedError: if data that the attack needs is missing.
        """

    def trigger(self, prompt: tuple[Message, ...]) -> tuple[Message, ...]:
        """Return a harmful prompt in the form in which the attacker asks it after training; the same by default."""
        return prompt

    def decode(self, text: str) -> str:
        """Return a completion of a triggered prompt as the attacker reads it; the same by default.

        For attacks that teach another writing, such as a cipher: judges read the decoded text.
        """
        return text


ATTACKS: Registry[Attack] = Registry("attack", __name__, Attack)
