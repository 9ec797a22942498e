"""The contract of a prompt set: harmful prompts, which a model should refuse, or benign ones, which it should answer.

Each set is one file in this package; the file's name is the set's name. No prompts are shipped: each set is read from
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
    """Prompts to evaluate on. `load` is pure: it returns the same rows every time."""

    @abstractmethod
    def load(self) -> Sequence[Example]:
        """Return the prompts in a fixed order, each with its own id; `completion` may be empty.

        Raises:
            StayalignedError: if the source is missing, gated, empty or malformed.
        """


PROMPTS: Registry[Prompts] = Registry("prompts", __name__, Prompts)  # pyright: ignore[reportAbstractUsage]


def parse_prompts(value: object) -> object:
    """Return a prompt set from its name or mapping; a source (path, `hf://...`, `testbed:...`) and None are unchanged.

    Raises:
        ValueError: if the value is neither (pydantic collects what a validator raises).
    """
    if value is None or (isinstance(value, str) and _is_source(value)):
        return value
    try:
        return PROMPTS.parse(value)
    except ValueError as error:
        if not isinstance(value, str):
            raise
        raise ValueError(f"{error} Or give a source: path/rows.jsonl or hf://owner/name.") from None


def load_prompts(prompts: str | Prompts, origin: Origin) -> Sequence[Example]:
    """Return the rows of a prompt set or of a source.

    Raises:
        StayalignedError: as `Prompts.load` and `read_examples`.
    """
    return read_examples(prompts, origin=origin, prompts_only=True) if isinstance(prompts, str) else prompts.load()


def _is_source(value: str) -> bool:
    """Return whether a value is a source: looks like a path, or is an existing path and not a prompt set's name."""
    if any(mark in value for mark in "/.:?\\"):
        return True
    return value not in PROMPTS.names() and Path(value).exists()
