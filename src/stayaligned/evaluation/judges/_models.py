"""Shared code of the judges that run a model in this process."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Generator, Iterable, Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from stayaligned.core.records import Completion, Outcome, Verdict
from stayaligned.evaluation.judges import Judge

if TYPE_CHECKING:
    from stayaligned.hf.judge_models.guard import GuardModel, GuardReply

CUT = "completion cut to fit the judge's input"
REQUEST_TOO_LONG = "the request alone exceeds the judge's input"
_LONGEST_QUOTE = 60


def last_request(completion: Completion) -> str:
    """Return the last turn of the prompt."""
    return completion.prompt[-1].content


def empty_verdicts(judge: Judge, completions: Sequence[Completion]) -> Iterable[Verdict]:
    """Yield the verdict `other` for every empty completion, which needs no model."""
    for c in completions:
        if not c.text.strip():
            yield judge.make_verdict(c, Outcome.OTHER, reason="empty")


class GuardJudge(Judge):
    """Base class of judges that ask a guard: a language model trained to classify a request with its completion."""

    uses_torch: ClassVar[bool] = True
    operational: ClassVar[frozenset[str]] = frozenset({"batch_size"})

    model: str
    """Checkpoint directory or hub id of the guard."""
    batch_size: int = Field(default=16, ge=1)
    """Number of completions per batch; verdicts are stored after each batch."""

    @abstractmethod
    def ask(self, guard: GuardModel, completions: Sequence[Completion]) -> Iterable[tuple[int, GuardReply]]:
        """Yield the index of each completion with the guard's reply."""

    @abstractmethod
    def read(self, reply: str, completion: Completion) -> tuple[Outcome | None, tuple[str, ...], str]:
        """Parse a reply into outcome, categories of harm and reason; the outcome is None for an invalid reply."""

    def judge(self, completions: Sequence[Completion]) -> Generator[Verdict]:
        """Yield one verdict per completion, batch by batch. Completions with an invalid reply are unscored.

        Raises:
            StayalignedError: If the model cannot be loaded, or its chat template omits the request or the completion.
        """
        from stayaligned.hf.judge_models.guard import GuardModel

        yield from empty_verdicts(self, completions)
        asked = [c for c in completions if c.text.strip()]
        if not asked:
            return
        for row, reply in self.ask(GuardModel.load(self.model), asked):
            yield self._verdict(asked[row], reply)

    def _verdict(self, completion: Completion, reply: GuardReply) -> Verdict:
        if reply.text is None:
            outcome, categories, notes = None, (), [REQUEST_TOO_LONG]
        else:
            outcome, categories, reason = self.read(reply.text, completion)
            notes = [CUT] if reply.was_cut else []
            notes += [reason] if reason else []
        return self.make_verdict(completion, outcome, categories=categories, reason="; ".join(notes))


def unreadable(reply: str) -> str:
    """Return the reason for an unscored verdict whose reply has not the expected format."""
    quote = " ".join(reply.split())
    return f"unreadable reply: {quote[:_LONGEST_QUOTE]!r}" if quote else "no reply"
