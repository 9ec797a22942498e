"""Rows that are kept one by one while long work goes on, so that killed work goes on where it was."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from pathlib import Path
from typing import BinaryIO, Generic, TypeVar

from pydantic import BaseModel

from stayaligned.records import read_jsonl

RowT = TypeVar("RowT", bound=BaseModel)


class Journal(Generic[RowT]):
    """JSON lines that only grow. A row that was added survives the process that added it, killed or not."""

    def __init__(self, rows: list[RowT], stream: BinaryIO) -> None:
        self.rows = rows
        """What earlier work has left."""
        self._stream = stream

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: Path, model: type[RowT]) -> Generator[Journal[RowT]]:
        """The journal in `path`, made if it is not there; a last line that a kill or a full disk tore is dropped.

        Raises:
            StayalignedError: naming the line, if another one is no such row.
            OSError: if it can't be written.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as stream:
            stream.seek(0)
            content = stream.read()
            stream.truncate(content.rfind(b"\n") + 1)
            yield cls(read_jsonl(path, model), stream)

    def add(self, row: RowT) -> None:
        """Keep one more row."""
        self._stream.write(row.model_dump_json().encode() + b"\n")
        self._stream.flush()
