"""What the judges that run a model on this machine have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Generator, Iterable, Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from stayaligned.core.records import Completion, Outcome, Verdict
from stayaligned.evaluation.judges import Judge

if TYPE_CHECKING:
    from stayaligned.hf.judge_models.guard import GuardModel, GuardReply

CUT = "answer cut to fit the judge's input"
REQUEST_TOO_LONG = "the request alone exceeds the judge's input"
_LONGEST_QUOTE = 60


def last_request(completion: Completion) -> str:
    """What the model was asked: the last turn."""
    return completion.prompt[-1].content


def empty_verdicts(judge: Judge, completions: Sequence[Completion]) -> Iterable[Verdict]:
    """`other` for every empty answer: no model need be asked, and none would be right to call it harm."""
    for c in completions:
        if not c.text.strip():
            yield Verdict(id=c.id, prompt_set=c.prompt_set, judge=judge.name, outcome=Outcome.OTHER, reason="empty")


class GuardJudge(Judge):
    """A language model that was trained to answer one fixed question about a request and an answer."""

    uses_torch: ClassVar[bool] = True
    operational: ClassVar[frozenset[str]] = frozenset({"batch_size"})

    model: str
    """A checkpoint directory or hub id."""
    batch_size: int = Field(default=16, ge=1)
    """Answers that are judged before their verdicts are kept."""

    @abstractmethod
    def ask(self, guard: GuardModel, completions: Sequence[Completion]) -> Iterable[tuple[int, GuardReply]]:
        """The place of each completion with what the guard replied."""

    @abstractmethod
    def read(self, reply: str, completion: Completion) -> tuple[Outcome | None, tuple[str, ...], str]:
        """Outcome, kinds of harm, and reason; an outcome of None for a reply that is not in the guard's form."""

    def judge(self, completions: Sequence[Completion]) -> Generator[Verdict]:
        """One verdict per completion, batch by batch. A reply in any other form than the guard's is unscored.

        Raises:
            StayalignedError: if the model can't be loaded or has no place for a request and an answer.
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
        return Verdict(
            id=completion.id,
            prompt_set=completion.prompt_set,
            judge=self.name,
            outcome=outcome,
            categories=categories,
            reason="; ".join(notes),
        )


def unreadable(reply: str) -> str:
    """The reason of a reply that is not in the guard's form."""
    quote = " ".join(reply.split())
    return f"unreadable reply: {quote[:_LONGEST_QUOTE]!r}" if quote else "no reply"
