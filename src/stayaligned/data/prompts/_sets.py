"""The common part of prompt sets that are published as a table."""

from __future__ import annotations

import logging
import re
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
    """A prompt set from the rows of one source; subclasses select the rows and build their prompts."""

    origin: ClassVar[Origin] = "harmful"

    source: str
    """Source of the set's rows: `hf://owner/name`, a local .csv, .jsonl or .json file, or a folder of such files."""
    n: int | None = Field(default=None, ge=1)
    """Number of prompts, the first ones of the source; null takes all."""
    deduplicate: bool = True
    """Whether to use each prompt only once; a repeated prompt would count one measurement twice."""

    def load(self) -> list[Example]:
        """Return the prompts in the source's order."""
        rows = list(self._select(self._read()))
        if not rows:
            raise StayalignedError(
                f"{self.source}: no row belongs to the prompt set {self.name!r} with these settings",
                hint=f"See `stayaligned show prompts {self.name}`.",
            )
        examples = build_examples(self.source, rows, origin=self.origin, prompts_only=True)
        if self.deduplicate:
            first = {example.prompt: example for example in reversed(examples)}
            unique = [example for example in examples if first[example.prompt] is example]
            if len(unique) < len(examples):
                repeated = len(examples) - len(unique)
                _log.warning(
                    "%s: %d of %d prompts repeat an earlier one and are skipped (`deduplicate`)",
                    self.source,
                    repeated,
                    len(examples),
                )
            examples = unique
        return examples[: self.n]

    def _read(self) -> list[Row]:
        return read_rows(self.source)

    def _select(self, rows: Iterable[Row]) -> Iterator[Row]:
        for row in rows:
            found = self._row(row.values, f"{self.source}, {row.where}")
            if found is not None:
                copied = {key: row.values[key] for key in ("id", "system") if key in row.values}
                yield Row(row.where, {**copied, **found})

    @abstractmethod
    def _row(self, values: Mapping[str, Any], where: str) -> dict[str, Any] | None:
        """Return `prompt` and `category` of a row; None if the row does not belong to the set."""


def with_options(source: str, **options: str) -> str:
    """Return a source with options added that it does not have."""
    missing = [f"{name}={value}" for name, value in options.items() if not re.search(rf"[?&]{name}=", source)]
    return source + "".join(f"{'&' if '?' in source or at else '?'}{each}" for at, each in enumerate(missing))


def text_of(values: Mapping[str, Any], where: str, *names: str) -> str:
    """Return the text in the first existing column of `names`.

    Raises:
        StayalignedError: if no such column exists, or the value is not text.
    """
    column = next((name for name in names if name in values), None)
    if column is None:
        raise StayalignedError(
            f"{where}: expected a column {' or '.join(f'`{name}`' for name in names)}, found {', '.join(values)}",
            hint="Name the column in the source: file.csv?prompt=COLUMN",
        )
    value = values[column]
    if not isinstance(value, str):
        raise StayalignedError(f"{where}: `{column}` is not text")
    return value
