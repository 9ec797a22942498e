"""Where the command prints, and how it shows long work."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

from rich.console import Console

from stayaligned.core.text import visible

if TYPE_CHECKING:
    from rich.table import Table

    from stayaligned.weights.deltas import BytesDone


class _SafeConsole(Console):
    """Prints text as text: what a data set, a judge or a model wrote can't drive the terminal."""

    def print(self, *objects: Any, **options: Any) -> None:
        """As rich does, with control characters of strings made visible."""
        super().print(*(visible(o) if isinstance(o, str) else o for o in objects), **options)


out = _SafeConsole(highlight=False, markup=False)
err = _SafeConsole(stderr=True, highlight=False, markup=False)


def plain_table(*columns: str, numbers: bool = False) -> Table:
    """A table without lines; `numbers` puts all columns but the first on the right."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if numbers and index else "left")
    return table


@contextlib.contextmanager
def weights_bar() -> Generator[Callable[[BytesDone], None]]:
    """A bar of the bytes of the weights that have streamed past, with the rate and the time left; none on a pipe."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("weights"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, disable=not err.is_terminal, transient=True) as bar:
        task = bar.add_task("weights", total=None)

        def show(state: BytesDone) -> None:
            bar.update(task, completed=state.done, total=state.total)

        yield show
