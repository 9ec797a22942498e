"""The terminal: where the command prints, and tables."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from rich.console import Console

from stayaligned.core.text import visible

if TYPE_CHECKING:
    from rich.table import Table


class _SafeConsole(Console):
    """A console on which text from a data set, a judge or a model can't control the terminal."""

    def print(self, *objects: Any, **options: Any) -> None:
        """Print as rich does, with control characters made visible."""
        super().print(*(visible(o) if isinstance(o, str) else o for o in objects), **options)

    def on_broken_pipe(self) -> None:
        """Print nothing more; rich would end the command, whose work and exit code don't depend on a reader."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


out = _SafeConsole(highlight=False, markup=False)
err = _SafeConsole(stderr=True, highlight=False, markup=False)


def plain_table(*columns: str, numbers: bool = False) -> Table:
    """Return an empty table without lines; with `numbers`, all columns but the first are aligned to the right."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if numbers and index else "left")
    return table
