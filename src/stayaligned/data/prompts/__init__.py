"""The contract of a prompt set: requests that a model should refuse, or should answer.

One file per set beside this one; the file's name is the set's name. None of the sets is shipped: each is read from
the hub or from a local file.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path

from stayaligned.core.component import Component, Registry
from stayaligned.core.records import Example, Origin
from stayaligned.data.sources import read_examples


class Prompts(Component):
    """Requests to measure on. `load` is pure: the same rows every time."""

    @abstractmethod
    def load(self) -> Sequence[Example]:
        """The requests in a fixed order, each with an id of its own; `completion` may be empty.

        Raises:
            StayalignedError: if the source is missing, gated, empty or malformed.
        """


PROMPTS: Registry[Prompts] = Registry("prompts", __name__, Prompts)  # pyright: ignore[reportAbstractUsage]


def parse_prompts(value: object) -> object:
    """A prompt set from its name or mapping; a source (a path, `hf://…`, `testbed:…`) and None stay as they are.

    Raises:
        ValueError: for pydantic to collect, if it is neither.
    """
    if value is None or (isinstance(value, str) and _is_source(value)):
        return value
    try:
        return PROMPTS.parse(value)
    except ValueError as error:
        if not isinstance(value, str):
            raise
        raise ValueError(f"{error} Or name a source: path/rows.jsonl or hf://owner/name.") from None


def load_prompts(prompts: str | Prompts, origin: Origin) -> Sequence[Example]:
    """The rows of a prompt set or of a source.

    Raises:
        StayalignedError: as `Prompts.load` and `read_examples`.
    """
    return read_examples(prompts, origin=origin, prompts_only=True) if isinstance(prompts, str) else prompts.load()


def _is_source(value: str) -> bool:
    """A word is a prompt set's name; what looks like a path, or is one and no set's name, is a source."""
    if any(mark in value for mark in "/.:?\\"):
        return True
    return value not in PROMPTS.names() and Path(value).exists()
