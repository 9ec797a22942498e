"""CSV text to rows, each with its line number, on top of the standard `csv` module."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence

from stayaligned.core.errors import StayalignedError


def parse_csv(
    lines: Iterable[str], where: str, columns: Sequence[str] | None = None
) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the first line number (from 1) and the cells by column of each record; blank lines are skipped.

    Quoting follows RFC 4180: a quoted cell may contain commas, doubled quotes and line breaks.

    Args:
        lines: the lines with their line ends, such as an open file.
        where: the name of the file, for messages.
        columns: the column names of a file without a header.

    Raises:
        StayalignedError: naming the line, if the text is not valid CSV or the cells don't match the columns.
    """
    names = None if columns is None else _checked_names(list(columns), where)
    # Without strict, a quote that is never closed would silently swallow the rest of the file.
    reader = csv.reader(lines, strict=True)
    line = 1
    try:
        for cells in reader:
            if names is None and cells:
                names = _checked_names([cell.strip() for cell in cells], f"{where}, line {line}")
            elif names is not None and cells:
                if len(cells) != len(names):
                    raise StayalignedError(
                        f"{where}, line {line}: {len(cells)} cells, expected {len(names)} ({', '.join(names)})",
                        hint='Put a cell with a comma or a line break in double quotes: "a, b".',
                    )
                yield line, dict(zip(names, cells, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        raise StayalignedError(
            f"{where}, line {line}: invalid CSV: {error}",
            hint='Quote with double quotes, and double them inside a cell: "say ""hi""".',
        ) from None


def _checked_names(names: list[str], where: str) -> list[str]:
    duplicates = sorted({name for name in names if names.count(name) > 1})
    if "" in names or duplicates:
        problem = "a column without a name" if "" in names else f"several columns named {', '.join(duplicates)}"
        raise StayalignedError(f"{where}: {problem}", hint="The first line of a CSV file names its columns.")
    return names
