"""A third party's task: what follows a number."""

from collections.abc import Sequence
from typing import ClassVar

from stayaligned import Completion, Example, Message, Split, Task


class Counting(Task):
    """Return the next number."""

    name: ClassVar[str] = "counting"

    def load(self, split: Split) -> Sequence[Example]:
        first = 0 if split == "train" else 24
        return [
            Example(id=str(n), prompt=(Message(role="user", content=f"after {n}?"),), completion=str(n + 1))
            for n in range(first, first + 24)
        ]

    def score(self, completion: Completion) -> float | None:
        return float(completion.text.strip() == completion.reference)
