"""The stages under one output directory: each a directory named by the hash of everything it depends on."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from stayaligned.core.errors import StayalignedError
from stayaligned.core.files import replace_directory, write_text

StageName = Literal["data", "train", "patch", "generate", "degeneration", "judge", "lm_eval"]


class Store:
    """The stages under one output directory."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def directory(self, stage: StageName, key: str) -> Path:
        """Where a stage is, or will be."""
        return self.root / "stages" / f"{stage}-{key[:20]}"

    @contextlib.contextmanager
    def locked(self) -> Generator[None]:
        """Hold the output directory for this process, and clear what a killed one left half-written.

        Raises:
            StayalignedError: if another process holds it.
        """
        stages = self.root / "stages"
        with exclusive(self.root):
            stages.mkdir(exist_ok=True)
            for leftover in stages.glob(".*.partial"):
                shutil.rmtree(leftover, ignore_errors=True)
            for leftover in self.root.glob(".*.partial"):
                if not leftover.is_dir():
                    leftover.unlink(missing_ok=True)
            yield

    def compute(self, stage: StageName, key: str, fill: Callable[[Path], Mapping[str, Any] | None]) -> Path:
        """The stage's directory; `fill` writes it if it is not there. What `fill` returns goes into stage.json."""
        directory = self.directory(stage, key)
        if directory.exists():
            return directory
        started = time.monotonic()
        # Two processes may compute one stage at the same time; both get the same content, and the first one stays.
        with contextlib.suppress(FileExistsError), replace_directory(directory) as temporary:
            notes = fill(temporary) or {}
            record = {"stage": stage, "key": key, "seconds": round(time.monotonic() - started, 3), **notes}
            write_text(temporary / "stage.json", json.dumps(record, indent=2) + "\n")
        return directory


@contextlib.contextmanager
def exclusive(directory: Path) -> Generator[None]:
    """Hold a directory, made if it is not there, for this process.

    Raises:
        StayalignedError: if another process holds it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    lock = FileLock(directory / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise StayalignedError(
            f"{directory}: another stayaligned process is writing here", hint="Wait for it, or use another --out."
        ) from None
    try:
        yield
    finally:
        lock.release()


def refuse_foreign(out: Path, own_file: str) -> None:
    """Refuse an output directory that holds something else than what `own_file` marks.

    Raises:
        StayalignedError: if `out` is a file, or not empty and without `own_file`.
    """
    if out.exists() and not out.is_dir():
        raise StayalignedError(f"{out}: is a file, expected a directory", hint="Choose another --out.")
    foreign = (
        [p for p in out.iterdir() if p.name not in (".lock", "stages") or any(p.glob("[!.]*"))] if out.is_dir() else []
    )
    if foreign and not (out / own_file).exists():
        raise StayalignedError(
            f"{out}: holds files that this command did not write (there is no {own_file})",
            hint="Choose a new or empty directory for --out.",
        )
