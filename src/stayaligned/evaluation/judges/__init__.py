"""The contract of a judge: completions in, verdicts out.

One file per judge beside this one; the file's name is the judge's name. Judging is separate from generating: a
judge sees completions on disk and needs no model under test.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from stayaligned.core.component import Component, Registry
from stayaligned.core.records import Completion, Verdict


@dataclass(frozen=True, slots=True)
class ScoreScale:
    """The judge's own number beside its outcome: the name of its mean, and its ends."""

    name: str
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Forecast:
    """What judging would take, said before it starts."""

    requests: int
    tokens: int
    """Of input and output together, estimated."""
    dollars: float | None = None
    """None where no prices are known."""

    def __str__(self) -> str:
        price = "" if self.dollars is None else f", about ${self.dollars:.2f}"
        return f"{self.requests} requests, about {self.tokens} tokens{price}"


class Judge(Component):
    """Reads answers to harmful and to benign prompts and says: refuse, harm, other, safe, or unscored."""

    uses_torch: ClassVar[bool] = False
    """Whether it runs a model in this process."""
    scale: ClassVar[ScoreScale | None] = None
    """What `Verdict.score` is on harmful prompts; None for judges that give no number."""

    @abstractmethod
    def judge(self, completions: Sequence[Completion]) -> Iterable[Verdict]:
        """One verdict per completion. What can't be read is `outcome=None`, never a guess.

        A list, or a generator that yields each verdict when it is known, in any order: every one is on disk before the
        next is asked for, so that an interrupted judge is not asked again what it has answered.

        Raises:
            StayalignedError: if the judge itself can't work (its model is missing, say).
        """

    @property
    def tells_refusals(self) -> bool:
        """Whether its verdicts tell a refusal from another harmless answer; if not, it gives a harmful score alone."""
        return True

    def forecast(self, completions: Sequence[Completion]) -> Forecast | None:
        """What judging these would take; None for judges that cost nothing worth saying.

        Raises:
            StayalignedError: if it is more than the judge's settings allow.
        """
        return None


JUDGES: Registry[Judge] = Registry("judge", __name__, Judge)
