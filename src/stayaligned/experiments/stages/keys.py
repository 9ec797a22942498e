"""The key of a stage: the hash of everything that it depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from stayaligned import testbed
from stayaligned.core.files import fingerprint

# Raised when a stage's files change their meaning; old ones are then computed again.
_STAGE_VERSION = 1


# Settings whose value may be a folder's bare name.
_PATH_SETTINGS = frozenset(
    {"model", "base_model", "adapter", "source", "harmful_prompts", "benign_prompts", "include_path"}
)


_LONGEST_PATH = 1024


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
