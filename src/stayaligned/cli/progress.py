"""Progress of long work: a live line or bars on a terminal; on a pipe or in a log file, about one line a minute.

All of it goes to stderr. On a pipe, a line has a time stamp, and new work is announced at once.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Generator
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.markup import escape

from stayaligned.cli.console import err
from stayaligned.core.text import visible
from stayaligned.experiments.jobs import Listener

if TYPE_CHECKING:
    from rich.progress import TaskID

    from stayaligned.core.progress import Progress
    from stayaligned.weights.deltas import BytesDone

_INTERVAL = 60.0
"""Seconds between two lines on a pipe, unless other work begins."""
_FIRST = 5.0
"""Seconds until the first line, if no work was announced before."""


class _Work:
    """One piece of work and the time that it will still take, judged by what it took so far."""

    def __init__(self, name: str, share: float = 0.0) -> None:
        self.name = name
        self._started, self._began_at = time.monotonic(), share
        self._share, self._detail = share, ""

    def report(self, share: float, detail: str) -> None:
        """Record how much is done."""
        self._share, self._detail = share, detail or self._detail

    def __str__(self) -> str:
        """Return the work, the last detail, the share and the time left, as far as they are known."""
        share = f"{self._share:.0%}" if self._share else ""
        facts = ", ".join(text for text in (self._detail, share, self._left()) if text)
        return f"{self.name}: {facts}" if facts else self.name

    def _left(self) -> str:
        elapsed, done = time.monotonic() - self._started, self._share - self._began_at
        if done <= 0 or elapsed < 1 or self._share >= 1:
            return ""
        return f"{_duration(elapsed * (1 - self._share) / done)} left"


class _TimedLines:
    """Prints lines with time stamps: those that it is given, and once a minute, from a thread, what `describe` says."""

    def __init__(self, console: Console, describe: Callable[[], str]) -> None:
        self._console, self._describe = console, describe
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._next = time.monotonic() + _FIRST
        self._thread = threading.Thread(target=self._print_regularly, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._ended.set()
        self._thread.join()

    def print(self, text: str) -> None:
        """Print a line, and wait a minute from here for the next regular one."""
        with self._lock:
            self._next = time.monotonic() + _INTERVAL
            self._console.print(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}", soft_wrap=True)

    def _print_regularly(self) -> None:
        while not self._ended.wait(max(0.01, self._next - time.monotonic())):
            if time.monotonic() >= self._next:
                self.print(self._describe())


@contextlib.contextmanager
def status(text: str) -> Generator[Progress]:
    """Show the progress that the yielded function receives within the block; `text` at first."""
    work = _Work(text)
    if err.is_terminal:
        with err.status(escape(visible(text)), spinner_style="none") as live:

            def show(name: str, share: float, detail: str = "", /) -> None:
                nonlocal work
                work = work if work.name == name else _Work(name, share)
                work.report(share, detail)
                live.update(escape(visible(str(work))))

            yield show
        return
    with _TimedLines(err, lambda: str(work)) as lines:

        def record(name: str, share: float, detail: str = "", /) -> None:
            nonlocal work
            begins = work.name != name
            work = _Work(name, share) if begins else work
            work.report(share, detail)
            if begins:
                lines.print(str(work))

        yield record


@contextlib.contextmanager
def weights_bar() -> Generator[Callable[[BytesDone], None]]:
    """Show the bytes of weights that were read, with the time left; on a terminal as a bar with the rate."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    if not err.is_terminal:
        with status("read weights") as report:
            yield lambda state: report(
                "read weights",
                state.done / state.total if state.total else 0.0,
                f"{state.done / 1e9:.2f} of {state.total / 1e9:.2f} GB",
            )
        return
    columns = (TextColumn("weights"), BarColumn(20), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task("weights", total=None)
        yield lambda state: bar.update(task, completed=state.done, total=state.total)


class GridProgress(Listener):
    """Shows a bar for all jobs and one for each worker; on a pipe, a line for each finished job and one a minute."""

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

        self._console = console
        self._lock = threading.Lock()
        self._works: dict[int, _Work] = {}
        self._bars: dict[int, TaskID] = {}
        self._total = self._finished = 0
        self._started = time.monotonic()
        self._lines = _TimedLines(console, self._describe)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=10),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._all: TaskID | None = None

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._progress.start()
        else:
            self._lines.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._console.is_terminal:
            self._lines.__exit__()
            return
        for task in self._bars.values():
            self._progress.remove_task(task)
        self._progress.stop()

    def started(self, total: int) -> None:
        """Show the number of jobs."""
        self._total, self._started = total, time.monotonic()
        if self._console.is_terminal:
            self._all = self._progress.add_task(self._count(), total=total)
        else:
            self._lines.print(f"{total} jobs")

    def progress(self, worker: int, work: str, share: float, detail: str = "") -> None:
        """Show what a worker is doing."""
        with self._lock:
            before = self._works.get(worker)
            if before is None or before.name != work:
                self._works[worker] = _Work(work, share)
            self._works[worker].report(share, detail)
            if self._console.is_terminal:
                if worker not in self._bars:
                    self._bars[worker] = self._progress.add_task("", total=100)
                text = escape(visible(str(self._works[worker])))
                self._progress.update(self._bars[worker], description=text, completed=round(100 * share))

    def finished(self, title: str, error: str | None) -> None:
        """Count a finished job; on a pipe, print a line for it."""
        with self._lock:
            self._finished += 1
            for worker in [each for each, work in self._works.items() if work.name.startswith(f"{title} ")]:
                del self._works[worker]
        if self._all is not None:
            self._progress.update(self._all, completed=self._finished, description=self._count())
        if not self._console.is_terminal:
            state = "done" if error is None else f"failed: {error}"
            self._lines.print(f"[{self._finished}/{self._total}] {title}: {state}")

    def _count(self) -> str:
        """The number of jobs that ended, and when the others will have."""
        left = ""
        if 0 < self._finished < self._total:
            elapsed = time.monotonic() - self._started
            left = f", about {_duration(elapsed * (self._total - self._finished) / self._finished)} left"
        return f"{self._finished} of {self._total} jobs done{left}"

    def _describe(self) -> str:
        with self._lock:
            return "; ".join([self._count(), *map(str, self._works.values())])


def _duration(seconds: float) -> str:
    """A duration in the largest unit that gives a whole number worth reading: 40 s, 4 min, 2 h 10 min."""
    if seconds < 60:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
