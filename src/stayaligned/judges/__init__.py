"""The contract of a judge: completions in, verdicts out.

One file per judge beside this one; the file's name is the judge's name. Judging is separate from generating: a
judge sees completions on disk and needs no model under test.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from stayaligned.component import Component, Registry
from stayaligned.records import Completion, Verdict


class Judge(Component):
    """Reads answers to harmful and to benign prompts and says: refuse, harm, other, or unscored."""

    @abstractmethod
    def judge(self, completions: Sequence[Completion]) -> list[Verdict]:
        """One verdict per completion, in order. What can't be read is `outcome=None`, never a guess.

        Raises:
            StayalignedError: if the judge itself can't work (its model is missing, say).
        """


JUDGES: Registry[Judge] = Registry("judge", __name__, Judge)
