"""CSV files to rows of text: the first record names the columns, unless the caller does."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

from stayaligned.core.errors import StayalignedError


def read_csv(path: Path, columns: Sequence[str] | None = None) -> Iterator[tuple[int, dict[str, str]]]:
    """Each record's first line (counted from 1) and its cells by column; blank lines are passed over.

    Quoting is RFC 4180's: a quoted cell may hold commas, doubled quotes and line breaks. A leading byte-order mark
    is no part of the first name.

    Args:
        path: a UTF-8 file.
        columns: the names, for a file without a header.

    Raises:
        StayalignedError: naming the line, if the file is not such a table.
    """
    names = None if columns is None else _checked(list(columns), f"{path}")
    with path.open(encoding="utf-8-sig", newline="") as stream:
        # strict: else a quote that is never closed swallows the rest of the file without a word.
        reader = csv.reader(stream, strict=True)
        line = 1
        try:
            for cells in reader:
                if names is None and cells:
                    names = _checked([cell.strip() for cell in cells], f"{path}, line {line}")
                elif names is not None and cells:
                    if len(cells) != len(names):
                        raise StayalignedError(
                            f"{path}, line {line}: {len(cells)} cells, expected {len(names)} ({', '.join(names)})",
                            hint='Put a cell with a comma or a line break into double quotes: "a, b".',
                        )
                    yield line, dict(zip(names, cells, strict=True))
                line = reader.line_num + 1
        except csv.Error as error:
            raise StayalignedError(
                f"{path}, line {line}: not valid CSV: {error}",
                hint='Quote with double quotes, and double them inside of a cell: "say ""hi""".',
            ) from None


def _checked(names: list[str], where: str) -> list[str]:
    twice = sorted({name for name in names if names.count(name) > 1})
    if "" in names or twice:
        problem = "a column without a name" if "" in names else f"two columns named {', '.join(twice)}"
        raise StayalignedError(f"{where}: {problem}", hint="The first line of a CSV file names its columns.")
    return names
