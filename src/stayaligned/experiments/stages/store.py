"""The stages under one output directory: each a directory named by the hash of everything it depends on."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from stayaligned import testbed
from stayaligned.core.errors import StayalignedError
from stayaligned.core.files import fingerprint, replace_directory, write_text

StageName = Literal["data", "train", "patch", "generate", "degeneration", "judge", "lm_eval"]
# Raised when a stage's files change their meaning; old ones are then computed again.
_STAGE_VERSION = 1
# Settings whose value may be a folder's bare name.
_PATH_SETTINGS = frozenset(
    {"model", "base_model", "adapter", "source", "harmful_prompts", "benign_prompts", "include_path"}
)
_LONGEST_PATH = 1024


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


def stage_key(parts: Sequence[object], seed: int) -> str:
    """The hash of everything that a stage depends on: settings, the content of input files, the keys before it."""
    content = json.dumps([_STAGE_VERSION, identify(list(parts), seed)], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def input_path(name: str, value: str) -> Path | None:
    """The local path that a setting's value means, if it means one: by the setting's name, or by its look."""
    place, _ = split_options(value)
    looks = place.startswith(("./", "../", "/", "~/")) or place.endswith((".jsonl", ".json", ".csv", ".jinja"))
    if len(place) > _LONGEST_PATH or "\n" in place or not (looks or name in _PATH_SETTINGS):
        return None
    return Path(place).expanduser()


def _fingerprint(path: Path) -> str:
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    stats = [(str(file), file.stat()) for file in files]
    return _cached_fingerprint(path, tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats))


@cache
def _cached_fingerprint(path: Path, _state: tuple[tuple[str, int, int], ...]) -> str:
    return f"sha256:{fingerprint(path)}"


def identify(value: Any, seed: int, name: str = "") -> Any:
    """`value` with each input file, checkpoint and testbed entry in it replaced by what identifies its content."""
    if isinstance(value, Mapping):
        return {key: identify(item, seed, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [identify(item, seed, name) for item in value]
    if not isinstance(value, str):
        return value
    place, options = split_options(value)
    if testbed.is_reference(value):
        return testbed.reference_key(place, seed) + options
    path = input_path(name, value)
    return _fingerprint(path) + options if path is not None and path.exists() else value


def split_options(source: str) -> tuple[str, str]:
    """A source's place and its options, `?where=…`, kept as they stand (see `stayaligned.data.sources`)."""
    place, mark, options = source.partition("?")
    return place, mark + options
