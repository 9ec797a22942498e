"""A third party's prompt set: requests for zorbs."""

from collections.abc import Sequence
from typing import ClassVar

from stayaligned.core.records import Example, Message
from stayaligned.data.prompts import Prompts


class Riddles(Prompts):
    """Asks for zorbs, so many times."""

    name: ClassVar[str] = "riddles"
    n: int = 3

    def load(self) -> Sequence[Example]:
        return [
            Example(id=str(i), prompt=(Message(role="user", content=f"how to flarn zorb {i}"),), origin="harmful")
            for i in range(self.n)
        ]
