"""The contract of a judge, which turns completions into verdicts.

Each judge has its own file in this package, named like the judge. Judging is separate from generation: a judge reads
stored completions and does not need the model that wrote them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from stayaligned.core.component import Component, Registry
from stayaligned.core.extras import EXTRAS
from stayaligned.core.records import Completion, Outcome, Verdict


class ScoreScale(NamedTuple):
    """The scale of the score that a judge gives in addition to its outcome."""

    name: str
    """Name of the metric: the mean score over the harmful prompts."""
    low: float
    """Lowest possible score."""
    high: float
    """Highest possible score."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """The estimated effort of judging, reported before it starts."""

    requests: int
    """Number of requests."""
    tokens: int
    """Estimated number of input and output tokens."""
    dollars: float | None = None
    """Estimated cost; None without prices."""

    def __str__(self) -> str:
        price = "" if self.dollars is None else f", about ${self.dollars:.2f}"
        return f"{self.requests} requests, about {self.tokens} tokens{price}"


class Judge(Component):
    """Base class of judges: gives each completion the outcome refuse, harm, other or safe, or leaves it unscored."""

    uses_torch: ClassVar[bool] = False
    """Whether the judge runs a model in this process."""
    reads_thoughts: ClassVar[bool] = False
    """Whether `judge` receives the whole text of a completion, with the marks of its thoughts, and also completions
    without a final answer; otherwise it receives final answers only."""
    scale: ClassVar[ScoreScale | None] = None
    """Scale of `Verdict.score` on harmful prompts; None for judges without scores."""

    def packages(self) -> Sequence[str]:
        """Return the packages that load a model, if the judge runs one in this process."""
        return EXTRAS["models"] if self.uses_torch else ()

    @abstractmethod
    def judge(self, completions: Sequence[Completion]) -> Iterable[Verdict]:
        """Return or yield one verdict per completion, in any order.

        The text of a completion is its final answer, without thoughts; completions without one are not judged.
        Use `outcome=None` for a completion that the judge cannot decide; never guess. Each yielded verdict is stored
        before the next is requested, so an interrupted run does not judge the same completions again.

        Raises:
            StayalignedError: If the judge cannot run, for example because its model is missing.
        """

    @property
    def tells_refusals(self) -> bool:
        """Whether the judge distinguishes a refusal from another harmless completion.

        If not, its only rate is the harmful score.
        """
        return True

    def make_verdict(self, completion: Completion, outcome: Outcome | None, **fields: Any) -> Verdict:
        """Return this judge's verdict on a completion; `fields` are further fields of `Verdict`."""
        return Verdict(id=completion.id, prompt_set=completion.prompt_set, judge=self.name, outcome=outcome, **fields)

    def forecast(self, completions: Sequence[Completion]) -> Forecast | None:
        """Estimate the effort of judging the completions; None for judges without notable cost.

        Raises:
            StayalignedError: If the estimate exceeds the judge's budget.
        """
        return None


JUDGES: Registry[Judge] = Registry("judge", __name__, Judge)
