"""The contract of a task: rows to train and test on, and how an answer is scored.

One file per task beside this one; the file's name is the task's name.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

from stayaligned.core.component import Component, Registry
from stayaligned.core.records import Completion, Example

Split = Literal["train", "test"]


class Task(Component):
    """What the user fine-tunes for. `load` and `score` are pure: the same rows and scores every time."""

    @abstractmethod
    def load(self, split: Split) -> Sequence[Example]:
        """The rows of a split, in a fixed order; `completion` is the answer to learn, or the reference.

        Raises:
            StayalignedError: if the source is missing, empty or malformed.
        """

    @abstractmethod
    def score(self, completion: Completion) -> float | None:
        """How right an answer is, 0 to 1, against `completion.reference`; None if it can't be scored."""

    def training_identity(self) -> dict[str, Any]:
        """What `load("train")` depends on: the identity, less what only testing and scoring read."""
        return self.identity()


TASKS: Registry[Task] = Registry("task", __name__, Task)  # pyright: ignore[reportAbstractUsage]
