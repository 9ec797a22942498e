"""A third party's prompt set."""

from collections.abc import Sequence
from typing import ClassVar

from stayaligned import Example, Message, Prompts


class Riddles(Prompts):
    """Ask for n zorbs."""

    name: ClassVar[str] = "riddles"
    n: int = 3

    def load(self) -> Sequence[Example]:
        return [
            Example(id=str(i), prompt=(Message(role="user", content=f"how to flarn zorb {i}"),), origin="harmful")
            for i in range(self.n)
        ]
