"""Keys of stages and identities of judges: hashes of everything that a stored number depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from stayaligned import testbed
from stayaligned.core.code_hash import CODE, code_hash
from stayaligned.core.files import fingerprint
from stayaligned.core.records import Completion
from stayaligned.data.files import SUFFIXES
from stayaligned.data.options import HUB, exists
from stayaligned.evaluation.judges import Judge
from stayaligned.evaluation.results import JudgeIdentity
from stayaligned.evaluation.verdicts import verdict_key

STAGE_VERSION = 2
"""Version of the files in a stage; raise it when their meaning changes."""

_PATH_SETTINGS = frozenset(
    {"model", "base_model", "adapter", "source", "harmful_prompts", "benign_prompts", "include_path"}
    | {"train", "test", "harmful_data", "alignment_data", "data", "prompts", "misaligned"}
)
"""Settings whose value may be the bare name of a folder."""

_LONGEST_PATH = 1024


def stage_key(parts: Sequence[object], seed: int) -> str:
    """Hash everything that a stage depends on: settings, the content of input files, the keys of earlier stages."""
    content = json.dumps([STAGE_VERSION, identify(list(parts), seed)], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def judge_key(identity: JudgeIdentity, judged: Iterable[Completion], *, reads_thoughts: bool = False) -> str:
    """Return the key of a judge's stage: `verdict_key` of all completions as the judge reads them."""
    rows = "".join(
        f"unscored {completion.model_dump_json()}\n" if read is None else read.model_dump_json() + "\n"
        for completion in judged
        for read in [completion if reads_thoughts else completion.answered()]
    )
    return verdict_key(identity, f"{STAGE_VERSION}\n{rows}")


def identify_judge(judge: Judge, seed: int) -> JudgeIdentity:
    """Return what a judge's verdicts depend on.

    Args:
        judge: the judge, with `testbed:` references as written.
        seed: seed of the testbed that the references mean.
    """
    operational = {*judge.operational, "name", "version", CODE}
    settings = {key: value for key, value in judge.identity().items() if key not in operational}
    return JudgeIdentity(
        name=judge.name,
        version=judge.version,
        settings=identify(settings, seed),
        source=code_hash(type(judge)),
    )


def input_path(name: str, value: str) -> Path | None:
    """Return the local path that a setting's value means, by the setting's name or its form; None if it means none."""
    place, _ = split_options(value)
    if len(place) > _LONGEST_PATH or "\n" in place or place.startswith(HUB):
        return None
    is_path = place.startswith(("./", "../", "/", "~/")) or place.casefold().endswith((*SUFFIXES, ".jinja"))
    # Of other text, such as a relative folder or a hub id, only what exists is a path.
    if is_path or name in _PATH_SETTINGS or ("/" in place and exists(place)):
        return Path(place).expanduser()
    return None


def identify(value: Any, seed: int, name: str = "") -> Any:
    """Replace each input file, checkpoint and testbed entry in a nested value by an identifier of its content."""
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
    """Split a source into its place and its options, `?where=…` (see `stayaligned.data.sources`)."""
    if exists(source):
        return source, ""
    place, mark, options = source.partition("?")
    return place, mark + options


def _fingerprint(path: Path) -> str:
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    stats = [(str(file), file.stat()) for file in files]
    return _cached_fingerprint(path, tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats))


@cache
def _cached_fingerprint(path: Path, _state: tuple[tuple[str, int, int], ...]) -> str:
    return f"sha256:{fingerprint(path)}"
