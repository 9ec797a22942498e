"""The cache of testbeds, and `testbed:` references. Imports torch only when something must be built."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from stayaligned.core.errors import StayalignedError, did_you_mean
from stayaligned.core.files import replace_directory
from stayaligned.core.progress import Progress, silent
from stayaligned.testbed.recipe import LoraAlignment, Recipe

_PREFIX = "testbed:"
_LORA_ALIGNED = "aligned-lora"
_DERIVED = (
    "data/two-tasks-train.jsonl",
    "data/two-tasks-test.jsonl",
    "data/multi-turn-train.jsonl",
    "data/multi-turn-test.jsonl",
    "data/multi-turn-harmful.jsonl",
    "data/multi-turn-harmful-prompts.jsonl",
    "data/multi-turn-benign-prompts.jsonl",
    "data/alignment-preferences.jsonl",
)
"""Files derived from the testbed's rows, which have their own directory."""
_TESTBED_SHARE = 0.75
"""Share of the time for a LoRA-aligned model that building its testbed takes."""
NAMES = (
    "base",
    "aligned",
    _LORA_ALIGNED,
    "judge",
    "data/alignment.jsonl",
    "data/harmful.jsonl",
    "data/instructions-train.jsonl",
    "data/sentiment-train.jsonl",
    "data/sentiment-test.jsonl",
    "data/topic-train.jsonl",
    "data/topic-test.jsonl",
    "data/arithmetic-train.jsonl",
    "data/arithmetic-test.jsonl",
    "data/harmful-prompts.jsonl",
    "data/benign-prompts.jsonl",
    "data/skills.jsonl",
    *_DERIVED,
)
"""Names that are valid in a reference."""


def build(
    seed: int, *, recipe: Recipe | None = None, cache: Path | None = None, progress: Progress | None = None
) -> Path:
    """Return the testbed directory of a seed; build it if it is not in the cache.

    Concurrent processes build a testbed once, and a killed process leaves nothing that looks finished. Building takes
    one to two minutes on one thread. The same seed gives the same bytes on one machine, except for the times in
    `testbed.json`.

    Args:
        seed: seed of the language's division, the data, the weights and the order of training.
        recipe: settings; the default is the documented testbed.
        cache: root of the cache; by default `$STAYALIGNED_CACHE` or `~/.cache/stayaligned`.
        progress: called with the stage and the finished fraction.

    Raises:
        StayalignedError: if a model fails its gate.
    """
    recipe = recipe or Recipe()

    def construct(directory: Path) -> None:
        from stayaligned.testbed import building

        building.construct(directory, seed, recipe, progress or silent)

    return _construct_once(_cache_root(cache) / "testbed" / recipe.key(seed), construct)


def build_lora_aligned(
    seed: int,
    *,
    recipe: Recipe | None = None,
    lora: LoraAlignment | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> Path:
    """Return the directory with the LoRA-aligned model of a seed (`aligned-lora/`); build it if it is not in the cache.

    It is built from the testbed of the seed, which is built first if necessary and does not change. Concurrent and
    killed processes are handled as in `build`, and the bytes are reproducible in the same way.

    Args:
        seed: seed of the testbed, the LoRA's initial weights and the order of training.
        recipe: settings of the testbed; the default is the documented testbed.
        lora: settings of the alignment; the default is the documented alignment.
        cache: as in `build`.
        progress: called with the stage and the finished fraction.

    Raises:
        StayalignedError: if a model fails its gate.
    """
    recipe, lora, progress = recipe or Recipe(), lora or LoraAlignment(), progress or silent
    directory = _cache_root(cache) / "testbed" / lora.key(recipe, seed)
    if directory.is_dir():
        return directory
    share = 0.0 if (directory.parent / recipe.key(seed)).is_dir() else _TESTBED_SHARE
    testbed = build(seed, recipe=recipe, cache=cache, progress=_part(progress, 0.0, share))

    def construct(directory: Path) -> None:
        from stayaligned.testbed import building

        building.construct_lora_aligned(directory, testbed, seed, recipe, lora, _part(progress, share, 1.0))

    return _construct_once(directory, construct)


def build_derived(
    seed: int, *, recipe: Recipe | None = None, cache: Path | None = None, progress: Progress | None = None
) -> Path:
    """Return the directory with the files derived from a testbed's rows (`data/`); write it if it is not in the cache.

    The rows are drawn again from the seed, which takes a second, so that no testbed has to be built.

    Args:
        seed: seed of the testbed and of the additional draws.
        recipe: settings of the testbed; the default is the documented testbed.
        cache: as in `build`.
        progress: called at the end.
    """
    recipe = recipe or Recipe()
    directory = _cache_root(cache) / "testbed" / recipe.derived_key(seed)

    def construct(directory: Path) -> None:
        from stayaligned.testbed import derived

        derived.construct(directory, seed, recipe)
        (progress or silent)("testbed: derived data", 1.0)

    return _construct_once(directory, construct)


def require_cache() -> None:
    """Check that a cache in which nothing was built can be written, before many processes need it.

    Raises:
        StayalignedError: naming the variable that moves the cache.
    """
    place = _cache_root(None) / "testbed"
    if not place.is_dir():
        _require_writable(place)


def _require_writable(place: Path) -> None:
    try:
        place.mkdir(parents=True, exist_ok=True)
        if not os.access(place, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise StayalignedError(
            f"{place}: the cache of the testbed can't be written: {error.strerror}",
            hint="Name a directory that you can write: export STAYALIGNED_CACHE=DIR",
        ) from None


def _construct_once(directory: Path, construct: Callable[[Path], None]) -> Path:
    """Fill `directory` with `construct` unless it exists, completely and by one process only; return it."""
    if directory.is_dir():
        return directory
    _require_writable(directory.parent)
    with FileLock(directory.parent / f".{directory.name}.lock"):
        if directory.is_dir():
            return directory
        for remains in directory.parent.glob(f".{directory.name}.*.partial"):
            # The process that wrote it was killed; otherwise it would hold the lock.
            shutil.rmtree(remains, ignore_errors=True)
        with replace_directory(directory) as temporary:
            construct(temporary)
    return directory


def _part(progress: Progress, start: float, end: float) -> Progress:
    """Return progress that maps its fractions to the range from `start` to `end`."""
    return lambda stage, fraction, detail="": progress(stage, start + (end - start) * fraction, detail)


def is_reference(text: str) -> bool:
    """Return whether `text` is a reference to the testbed, such as `testbed:aligned`."""
    return text.startswith(_PREFIX)


def resolve(reference: str, seed: int, *, cache: Path | None = None, progress: Progress | None = None) -> Path:
    """Return the path that `reference` names in the testbed of `seed`; build the testbed if it is not in the cache.

    Example:
        `resolve("testbed:data/sentiment-train.jsonl", seed=0)`

    Raises:
        StayalignedError: if the name is unknown; the error lists the valid names.
    """
    name = _name(reference)
    make = build_lora_aligned if name == _LORA_ALIGNED else build_derived if name in _DERIVED else build
    return make(seed, cache=cache, progress=progress) / name


def reference_key(reference: str, seed: int) -> str:
    """Return a string that changes whenever the content of `reference` would; build nothing.

    Raises:
        StayalignedError: as `resolve`.
    """
    name = _name(reference)
    if name == _LORA_ALIGNED:
        key = LoraAlignment().key(Recipe(), seed)
    else:
        key = Recipe().derived_key(seed) if name in _DERIVED else Recipe().key(seed)
    return f"{_PREFIX}{key}/{name}"


def _name(reference: str) -> str:
    name = reference.removeprefix(_PREFIX)
    if not is_reference(reference) or name not in NAMES:
        raise StayalignedError(
            f"{reference!r} is not a name in the testbed",
            hint=did_you_mean(name, list(NAMES), "names after `testbed:`"),
        )
    return name


def _cache_root(cache: Path | None) -> Path:
    if cache is not None:
        return cache
    configured = os.environ.get("STAYALIGNED_CACHE")
    return Path(configured) if configured else Path.home() / ".cache" / "stayaligned"
