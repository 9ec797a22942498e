"""Prompt sets that are a published table: a source, the rows of it that belong to the set, and how many."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

from pydantic import Field

from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import Example, Origin
from stayaligned.data.prompts import Prompts
from stayaligned.data.sources import Row, build_examples, read_rows

_log = logging.getLogger(__name__)


class TablePrompts(Prompts):
    """Rows of one source; subclasses say which belong to the set, and what of a row is asked."""

    origin: ClassVar[Origin] = "harmful"

    source: str
    """`hf://owner/name`, a local .csv, .jsonl or .json file, or a folder of them."""
    n: int | None = Field(default=None, ge=1)
    """The first so many prompts; null takes all."""
    deduplicate: bool = True
    """Keep a prompt's first row only. A repeated prompt is the same measurement again, counted as a new one."""

    def load(self) -> list[Example]:
        """The prompts in the source's order."""
        kept = list(self._belonging(self._read()))
        if not kept:
            raise StayalignedError(f"{self.source}: no row belongs to the prompt set {self.name!r} as it is set")
        examples = build_examples(self.source, kept, origin=self.origin, prompts_only=True)
        if self.deduplicate:
            first = {example.prompt: example for example in reversed(examples)}
            unique = [example for example in examples if first[example.prompt] is example]
            _log.info("%s: left out %d repeated prompts", self.source, len(examples) - len(unique))
            examples = unique
        return examples[: self.n]

    def _read(self) -> list[Row]:
        return read_rows(self.source)

    def _belonging(self, rows: Iterable[Row]) -> Iterator[Row]:
        for row in rows:
            found = self._row(row.values, f"{self.source}, {row.where}")
            if found is not None:
                kept = {key: row.values[key] for key in ("id", "system") if key in row.values}
                yield Row(row.where, {**kept, **found})

    @abstractmethod
    def _row(self, values: Mapping[str, Any], where: str) -> dict[str, Any] | None:
        """`prompt` and `category` of a row; None if the row is not of this set."""


def text_of(values: Mapping[str, Any], where: str, *names: str) -> str:
    """The text in the first of the columns `names` that there is.

    Raises:
        StayalignedError: if there is none, or it holds no text.
    """
    column = next((name for name in names if name in values), None)
    if column is None:
        raise StayalignedError(
            f"{where}: expected a column {' or '.join(f'`{name}`' for name in names)}, found {', '.join(values)}",
            hint="Name it in the source: file.csv?prompt=COLUMN",
        )
    value = values[column]
    if not isinstance(value, str):
        raise StayalignedError(f"{where}: `{column}` is no text")
    return value
