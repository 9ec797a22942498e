"""The terminal: where the command prints, tables, and the progress of long work."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

from rich.console import Console

from stayaligned.core.text import visible

if TYPE_CHECKING:
    from rich.table import Table

    from stayaligned.core.progress import Progress
    from stayaligned.weights.deltas import BytesDone


class _SafeConsole(Console):
    """A console on which text from a data set, a judge or a model can't control the terminal."""

    def print(self, *objects: Any, **options: Any) -> None:
        """Print as rich does, with control characters made visible and unencodable characters escaped."""
        super().print(*(self._printable(o) if isinstance(o, str) else o for o in objects), **options)

    def _printable(self, text: str) -> str:
        return visible(text).encode(self.encoding, "backslashreplace").decode(self.encoding)


out = _SafeConsole(highlight=False, markup=False)
err = _SafeConsole(stderr=True, highlight=False, markup=False)


def plain_table(*columns: str, numbers: bool = False) -> Table:
    """Return an empty table without lines; with `numbers`, all columns but the first are aligned to the right."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if numbers and index else "left")
    return table


@contextlib.contextmanager
def status(text: str) -> Generator[Progress]:
    """Show a status line, `text` at first, within the block; the yielded function updates it."""
    with err.status(text, spinner_style="none") as line:
        yield lambda text, share: line.update(f"{text} {share:.0%}" if share else text)


@contextlib.contextmanager
def weights_bar() -> Generator[Callable[[BytesDone], None]]:
    """Show a progress bar of the bytes of weights that were read, with rate and remaining time; nothing on a pipe."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("weights"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, disable=not err.is_terminal, transient=True) as bar:
        task = bar.add_task("weights", total=None)

        def show(state: BytesDone) -> None:
            bar.update(task, completed=state.done, total=state.total)

        yield show
