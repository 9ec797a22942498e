"""The stages in an output directory: each is a directory named by the hash of everything that it depends on."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from stayaligned.core.errors import StayalignedError
from stayaligned.core.files import replace_directory, write_text

StageName = Literal["data", "train", "patch", "generate", "degeneration", "judge", "lm_eval"]

FORMAT_FILE = "format.json"
DIRECTORY_FORMAT = 2
"""Version of an output directory's layout; raise it when files in it change their meaning or their names."""


class Store:
    """The stages in one output directory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.computed = 0
        """Number of stages that this object computed, rather than found."""

    def directory(self, stage: StageName, key: str) -> Path:
        """Return the directory of a stage, whether or not it is complete."""
        return self.root / "stages" / f"{stage}-{key[:20]}"

    def scratch(self, stage: StageName, key: str, kind: str) -> Path:
        """Return the path of what an unfinished stage stores to resume from: beside the stage, the same in a rerun."""
        return self.root / "stages" / f".{stage}-{key[:20]}.{kind}"

    def stages(self) -> set[Path]:
        """Return the directories of the complete stages."""
        return set((self.root / "stages").glob("[!.]*"))

    def refuse_foreign(self, own_file: str) -> None:
        """Refuse an output directory that another command, another program or another version wrote.

        Args:
            own_file: the name of the file by which the command marks its output directory.

        Raises:
            StayalignedError: if the root is a file, a directory without `own_file` that is not empty, or a directory
                in another version's format.
        """
        out = self.root
        if out.exists() and not out.is_dir():
            raise StayalignedError(f"{out}: is a file, expected a directory", hint="Choose another --out.")
        own = (".lock", "stages", FORMAT_FILE)
        foreign = [p for p in out.iterdir() if p.name not in own or any(p.glob("[!.]*"))] if out.is_dir() else []
        if not foreign:
            return
        if not (out / own_file).exists():
            raise StayalignedError(
                f"{out}: holds files that this command did not write (there is no {own_file})",
                hint="Choose a new or empty directory for --out.",
            )
        found = _read_format(out / FORMAT_FILE)
        if found != DIRECTORY_FORMAT:
            raise StayalignedError(
                f"{out}: written by another version of stayaligned (format {found}, this version uses "
                f"{DIRECTORY_FORMAT}); it can't be continued",
                hint="Use another --out, or remove the directory and rerun.",
            )

    @contextlib.contextmanager
    def locked(self) -> Generator[None]:
        """Lock the output directory for this process, and remove what a killed process left unfinished.

        Raises:
            StayalignedError: if another process has locked it.
        """
        stages = self.root / "stages"
        with exclusive(self.root):
            stages.mkdir(exist_ok=True)
            if _read_format(self.root / FORMAT_FILE) != DIRECTORY_FORMAT:  # new, or another version's without content
                write_text(self.root / FORMAT_FILE, json.dumps({"format_version": DIRECTORY_FORMAT}) + "\n")
            for leftover in stages.glob(".*.partial"):
                shutil.rmtree(leftover, ignore_errors=True)
            for leftover in self.root.glob(".*.partial"):
                if not leftover.is_dir():
                    leftover.unlink(missing_ok=True)
            yield

    def compute(self, stage: StageName, key: str, fill: Callable[[Path], Mapping[str, Any] | None]) -> Path:
        """Return the directory of a stage, computing the stage if it is missing.

        Args:
            stage: the kind of stage.
            key: the hash of everything that the stage depends on.
            fill: writes the stage's files into the directory that it is given; the mapping that it returns goes into
                `stage.json`, with the package's warnings, each once, as `notes`.
        """
        directory = self.directory(stage, key)
        if directory.exists():
            return directory
        started = time.monotonic()
        # Two processes may compute one stage at the same time; both get the same content, and the first one stays.
        with contextlib.suppress(FileExistsError), replace_directory(directory) as temporary:
            with collect_warnings() as notes:
                fields = dict(fill(temporary) or {})
            fields |= {"notes": notes} if notes else {}
            record = {"stage": stage, "key": key, "seconds": round(time.monotonic() - started, 3), **fields}
            write_text(temporary / "stage.json", json.dumps(record, indent=2) + "\n")
        self.computed += 1
        return directory


def read_stage(directory: Path) -> dict[str, Any]:
    """Return the record of a complete stage, `stage.json`."""
    return json.loads((directory / "stage.json").read_text(encoding="utf-8"))


@contextlib.contextmanager
def collect_warnings() -> Generator[list[str]]:
    """Collect this package's warnings within the block, each once: they become notes of a result.

    They are not printed as well, unless the block fails.
    """
    logger, handler = logging.getLogger("stayaligned"), _Collector()
    logger.addHandler(handler)
    try:
        yield handler.texts
    except BaseException:
        logger.removeHandler(handler)
        if logging.lastResort is not None and not logger.hasHandlers():
            for record in handler.records:
                logging.lastResort.handle(record)
        raise
    finally:
        logger.removeHandler(handler)


class _Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        if (text := record.getMessage()) not in self.texts:
            self.texts.append(text)
            self.records.append(record)


@contextlib.contextmanager
def exclusive(directory: Path) -> Generator[None]:
    """Lock a directory for this process, creating it if it does not exist.

    Raises:
        StayalignedError: if another process has locked it.
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


def _read_format(path: Path) -> object:
    """Return the version in a format file; 1 if there is none, since earlier versions wrote none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))["format_version"]
    except FileNotFoundError:
        return 1
    except (OSError, ValueError, KeyError, TypeError):
        return "unknown"
