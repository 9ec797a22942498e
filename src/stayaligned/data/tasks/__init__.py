"""The contract of a task: rows to train and test on, and the score of a completion.

Each task is one file in this package; the file's name is the task's name.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from stayaligned.core.component import Component, Registry
from stayaligned.core.records import Completion, Example

Split = Literal["train", "test"]


class Task(Component):
    """What the user fine-tunes for. `load` and `score` are pure: they return the same rows and scores every time."""

    reads_thoughts: ClassVar[bool] = False
    """Whether `score` receives the whole text of a completion, with the marks of its thoughts, and also completions
    without a final answer; otherwise it receives final answers only."""

    @abstractmethod
    def load(self, split: Split) -> Sequence[Example]:
        """Return the rows of a split in a fixed order; `completion` is the text to learn, or the reference.

        Raises:
            StayalignedError: if the source is missing, empty or malformed.
        """

    @abstractmethod
    def score(self, completion: Completion) -> float | None:
        """Return how well a completion matches its reference, 0 to 1; None if it can't be scored.

        The completion's text is the final answer, without thoughts; a completion that has none is not scored.
        """

    def score_answer(self, completion: Completion) -> float | None:
        """Return the score of a completion's final answer; None if it has none."""
        read = completion if self.reads_thoughts else completion.answered()
        return None if read is None else self.score(read)

    def training_identity(self) -> dict[str, Any]:
        """Return the settings that `load("train")` depends on, without those that only testing and scoring read."""
        return self.identity()


TASKS: Registry[Task] = Registry("task", __name__, Task)  # pyright: ignore[reportAbstractUsage]
