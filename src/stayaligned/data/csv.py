"""CSV and TSV text to rows, each with its line number, on top of the standard `csv` module."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence

from stayaligned.core.errors import StayalignedError

_LONGEST_CELL = 2**31 - 1
"""The longest cell, in characters; the module's own limit of 131072 is shorter than long documents."""


def parse_csv(text: str, where: str, columns: Sequence[str] | None = None) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the first line number (from 1) and the cells by column of each record; blank lines are skipped.

    Quoting follows RFC 4180: a quoted cell may contain commas, doubled quotes and line breaks. Cells are separated by
    commas, or by semicolons, tabs or bars if the first line is names between these, or as Excel's line `sep=` says. A
    column without a name, as pandas writes its index, is named "Unnamed: 0" and so on, as pandas reads it.

    Args:
        text: the text, with its line ends unchanged.
        where: the name of the file, for messages.
        columns: the column names of a file without a header.

    Raises:
        StayalignedError: naming the line, if the text is not valid CSV or the cells don't match the columns.
    """
    if stated := re.match(r"sep=([;,|\t])\r?\n", text):
        rows = _records(text[stated.end() :], where, columns, stated[1], csv.QUOTE_MINIMAL)
        yield from ((line + 1, cells) for line, cells in rows)
        return
    # Without strict, a quote that is never closed would silently swallow the rest of the file.
    yield from _records(text, where, columns, _delimiter(text, has_header=columns is None), csv.QUOTE_MINIMAL)


def parse_tsv(text: str, where: str, columns: Sequence[str] | None = None) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the records of tab-separated text as `parse_csv` does.

    Many writers of such files, GLUE's among them, never quote: if the quotes of a file don't follow RFC 4180, they are
    part of the text.
    """
    try:
        yield from list(_records(text, where, columns, "\t", csv.QUOTE_MINIMAL))
    except StayalignedError:
        yield from _records(text, where, columns, "\t", csv.QUOTE_NONE)


def _records(
    text: str, where: str, columns: Sequence[str] | None, delimiter: str, quoting: int
) -> Iterator[tuple[int, dict[str, str]]]:
    csv.field_size_limit(_LONGEST_CELL)
    names = None if columns is None else _checked_names(list(columns), where)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter, quoting=quoting)  # pyright: ignore[reportArgumentType]
    line = 1
    try:
        for cells in reader:
            if names is None and cells:
                names = _checked_names([cell.strip() for cell in cells], f"{where}, line {line}")
            elif names is not None and cells:
                if len(cells) != len(names):
                    raise StayalignedError(
                        f"{where}, line {line}: {len(cells)} cells, expected {len(names)} ({', '.join(names)})",
                        hint='Put a cell with a comma or a line break in double quotes: "a, b". If the first line is '
                        "a row, name the columns: ?columns=prompt,completion",
                    )
                yield line, dict(zip(names, cells, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        raise StayalignedError(
            f"{where}, line {line}: invalid CSV: {error}",
            hint='Quote with double quotes, and double them inside a cell: "say ""hi""".',
        ) from None


def _delimiter(text: str, *, has_header: bool) -> str:
    """Return the mark between cells: the one in a first line of names, `prompt;completion`; else a comma."""
    first = text.lstrip("\r\n").partition("\n")[0].strip().replace('"', "")
    for mark in ("\t", ";", "|"):
        if has_header and re.fullmatch(rf"[\w. -]+(?:{re.escape(mark)}[\w. -]*)+", first):
            return mark
    return ","


def _checked_names(names: list[str], where: str) -> list[str]:
    names = [name or f"Unnamed: {index}" for index, name in enumerate(names)]
    duplicates = sorted({name for name in names if names.count(name) > 1})
    if duplicates:
        raise StayalignedError(
            f"{where}: several columns named {', '.join(duplicates)}",
            hint="The first line of a CSV file names its columns. If it is a row: ?columns=prompt,completion",
        )
    return names
