"""Progress of a grid in the terminal: a bar for all jobs and one for each worker."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from stayaligned.core.text import visible
from stayaligned.experiments.jobs import Listener


class LiveProgress(Listener):
    """Shows bars on a terminal; on a pipe or in a log file, prints a line for each finished job."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._lock = threading.Lock()
        self._workers: dict[int, TaskID] = {}
        self._total = 0
        self._finished = 0
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._all: TaskID | None = None

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._workers.values():
            self._progress.remove_task(task)
        self._progress.stop()

    def started(self, total: int) -> None:
        """Show the bar for all jobs."""
        self._total = total
        self._all = self._progress.add_task("all jobs", total=total)

    def progress(self, worker: int, text: str, share: float) -> None:
        """Show what a worker is doing."""
        with self._lock:
            if worker not in self._workers:
                self._workers[worker] = self._progress.add_task("", total=100)
            self._progress.update(
                self._workers[worker], description=escape(visible(text)), completed=round(100 * share)
            )

    def finished(self, title: str, error: str | None) -> None:
        """Count a finished job; print a line for it if there are no bars."""
        self._finished += 1
        if self._all is not None:
            self._progress.update(self._all, completed=self._finished)
        if not self._console.is_terminal:
            state = "done" if error is None else f"failed: {error}"
            self._console.print(f"[{self._finished}/{self._total}] {title}: {state}", soft_wrap=True)
