"""The terminal: where the command prints, and tables."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from stayaligned.cli.modes import current_reply, discard
from stayaligned.core.errors import StayalignedError
from stayaligned.core.text import visible

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text


class _SafeConsole(Console):
    """A console on which text from a data set, a judge or a model can't control the terminal."""

    _silenced: object = None
    """The call whose further output is discarded."""
    for_errors = False
    """Whether `--quiet` leaves what is printed here."""

    @property
    def quiet(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether nothing is printed: the text of an answer with `--json`, all but errors with `--quiet`."""
        asked = current_reply().modes
        unwanted = asked.quiet and not self.for_errors if self.stderr else asked.json
        return unwanted or self._silenced is current_reply()

    @quiet.setter
    def quiet(self, value: bool) -> None:
        self._silenced = current_reply() if value else None

    def print(self, *objects: Any, **options: Any) -> None:
        """Print as rich does, with control characters made visible, and no word or number of a table cut.

        Raises:
            StayalignedError: if stdout can't be written. An unwritable stderr, and a pipe without a reader, lose the
                text alone.
        """
        try:
            self._print(*objects, **options)
        except OSError as error:
            self._discard()
            if not self.stderr:
                raise StayalignedError(
                    f"the output can't be written: {error.strerror or error}",
                    hint="Free some space, or use another file.",
                ) from error

    def _print(self, *objects: Any, **options: Any) -> None:
        from rich.table import Table

        if len(objects) == 1 and isinstance(objects[0], Table) and not _fit(objects[0], self):
            for line in _stacked(objects[0]):
                super().print(line, soft_wrap=True, **options)
            return
        if all(isinstance(o, str) for o in objects):
            options = {"soft_wrap": True, **options}  # a path that rich breaks can't be copied
        super().print(*(visible(o) if isinstance(o, str) else o for o in objects), **options)

    def on_broken_pipe(self) -> None:
        """Print nothing more; rich would end the command, whose work and exit code don't depend on a reader."""
        self._discard()

    def _discard(self) -> None:
        """Print nothing more, and let Python discard at its end what the stream still holds."""
        self.quiet = True
        discard(self.file)


out = _SafeConsole(highlight=False, markup=False)
"""The answer, on stdout."""
err = _SafeConsole(stderr=True, highlight=False, markup=False)
"""Progress and announcements, on stderr."""
errors = _SafeConsole(stderr=True, highlight=False, markup=False)
"""Errors, on stderr."""
errors.for_errors = True


def note(text: str) -> None:
    """Print a note on the answer, to stderr; it is in the JSON document too."""
    current_reply().notes.append(text)
    err.print(f"note: {text}", soft_wrap=True)


def wrote(path: Path, what: str = "", verb: str = "wrote ") -> None:
    """Print the name of a written file or directory, to stderr; it is in the JSON document too."""
    current_reply().files.append(str(path))
    err.print(f"{verb} {path}{what and f'  ({what})'}", soft_wrap=True)


def _fit(table: Table, console: Console) -> bool:
    """Give each column the width of its longest word or more, and return whether the table fits the console."""
    from rich.cells import cell_len
    from rich.measure import Measurement

    columns = [[_plain(cell) for cell in (column.header, *column.cells)] for column in table.columns]
    longest = [max(cell_len(line) for cell in cells for line in cell.split("\n")) for cells in columns]
    least = [max((cell_len(word) for cell in cells for word in cell.split()), default=0) for cells in columns]
    for column, width in zip(table.columns, longest, strict=True):
        column.width, column.overflow, column.no_wrap = width, "fold", False
    around = Measurement.get(console, console.options.update(width=1 << 20), table).maximum - sum(longest)
    spare = console.width - around - sum(least)
    if spare < 0:
        return False
    for index in sorted(range(len(columns)), key=lambda i: longest[i] - least[i]):
        # Columns that need little more get it; the last ones, with the longest texts, share what is left.
        added = min(longest[index] - least[index], spare)
        table.columns[index].width = least[index] + added
        spare -= added
    return True


def _stacked(table: Table) -> Iterator[Text]:
    """Yield the lines of a table that does not fit: for each row its first cell, and below it a line for each other."""
    from rich.text import Text

    titles = [" ".join(_plain(column.header).replace("-\n", "-").split()) for column in table.columns]
    indent = max(map(len, titles[1:]), default=0) + 2
    if table.title is not None:
        yield Text(_plain(table.title))
    cells = zip(*(column.cells for column in table.columns), strict=True)
    for row, (first, *others) in zip(table.rows, cells, strict=True):
        style = row.style or ""
        yield Text(f"{titles[0]} {_plain(first)}".lstrip(), style)
        for title, cell in zip(titles[1:], others, strict=True):
            if value := " ".join(_plain(cell).split()):
                yield Text(f"  {title:<{indent}}{value}" if title else f"  {value}", style)
    if table.caption is not None:
        yield Text(_plain(table.caption))


def _plain(cell: object) -> str:
    from rich.text import Text

    return cell.plain if isinstance(cell, Text) else visible(str(cell))


def plain_table(*columns: str, numbers: bool = False) -> Table:
    """Return an empty table without lines; with `numbers`, all columns but the first are aligned to the right."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if numbers and index else "left")
    return table
