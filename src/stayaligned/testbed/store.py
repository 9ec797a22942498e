"""Where testbeds are kept, and what `testbed:` references name. Imports no torch until something must be built."""

from __future__ import annotations

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
"""Files made of the testbed's own rows, in a directory of their own."""
_TESTBED_SHARE = 0.75
"""Share of the time for a LoRA-aligned model that its testbed takes, where that is not there yet."""
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
"""What a reference can name."""


def build(
    seed: int, *, recipe: Recipe | None = None, cache: Path | None = None, progress: Progress | None = None
) -> Path:
    """The finished testbed directory of a seed, built now if it is not in the cache.

    Two processes that ask for one testbed build it once; one that dies leaves nothing that looks finished. Building
    takes one to two minutes on one thread. The same seed gives the same bytes on one machine, but for the times in
    `testbed.json`.

    Args:
        seed: of the language's division, the data, the weights and the order of training.
        recipe: the settings; the default is the documented testbed.
        cache: the cache's root; `$STAYALIGNED_CACHE` or `~/.cache/stayaligned` if not given.
        progress: is told the stage and the fraction done.

    Raises:
        StayalignedError: if a model fails its gate.
    """
    recipe = recipe or Recipe()

    def construct(directory: Path) -> None:
        from stayaligned.testbed import building

        building.construct(directory, seed, recipe, progress or silent)

    return _made_once(_cache_root(cache) / "testbed" / recipe.key(seed), construct)


def build_lora_aligned(
    seed: int,
    *,
    recipe: Recipe | None = None,
    lora: LoraAlignment | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> Path:
    """The directory with the LoRA-aligned model of a seed (`aligned-lora/`), built now if it is not in the cache.

    It is made from the testbed of that seed, which is built first if need be and never changed. What `build` promises
    of two processes, of one that dies and of equal bytes holds here too.

    Args:
        seed: of the testbed, the LoRA's initial weights and the order of training.
        recipe: the testbed's settings; the default is the documented testbed.
        lora: the settings of this alignment; the default is the documented one.
        cache: as in `build`.
        progress: is told the stage and the fraction done.

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

    return _made_once(directory, construct)


def build_derived(
    seed: int, *, recipe: Recipe | None = None, cache: Path | None = None, progress: Progress | None = None
) -> Path:
    """The directory with the files made of a testbed's own rows (`data/`), written now if it is not in the cache.

    The rows are drawn anew from the seed, which takes a second, so that no testbed needs to be built.

    Args:
        seed: of the testbed, and of what is drawn besides.
        recipe: the testbed's settings; the default is the documented testbed.
        cache: as in `build`.
        progress: is told when it is done.
    """
    recipe = recipe or Recipe()
    directory = _cache_root(cache) / "testbed" / recipe.derived_key(seed)

    def construct(directory: Path) -> None:
        from stayaligned.testbed import derived

        derived.construct(directory, seed, recipe)
        (progress or silent)("testbed: derived data", 1.0)

    return _made_once(directory, construct)


def _made_once(directory: Path, construct: Callable[[Path], None]) -> Path:
    """`directory`, filled by `construct` unless it is there: by one process only, and all of it or nothing."""
    if directory.is_dir():
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(directory.parent / f".{directory.name}.lock"):
        if directory.is_dir():
            return directory
        for remains in directory.parent.glob(f".{directory.name}.*.partial"):
            # Whoever wrote it is dead, or it would hold the lock.
            shutil.rmtree(remains, ignore_errors=True)
        with replace_directory(directory) as temporary:
            construct(temporary)
    return directory


def _part(progress: Progress, start: float, end: float) -> Progress:
    """Progress over a stretch of a longer way."""
    return lambda stage, fraction: progress(stage, start + (end - start) * fraction)


def is_reference(text: str) -> bool:
    """Whether `text` names something of the testbed, as `testbed:aligned` does."""
    return text.startswith(_PREFIX)


def resolve(reference: str, seed: int, *, cache: Path | None = None, progress: Progress | None = None) -> Path:
    """The path of what `reference` names in the testbed of `seed`, built now if it is not in the cache.

    Example:
        `resolve("testbed:data/sentiment-train.jsonl", seed=0)`

    Raises:
        StayalignedError: if there is no such thing, with the list of what there is.
    """
    name = _name(reference)
    make = build_lora_aligned if name == _LORA_ALIGNED else build_derived if name in _DERIVED else build
    return make(seed, cache=cache, progress=progress) / name


def reference_key(reference: str, seed: int) -> str:
    """What `reference` stands for, as a string that changes whenever its content would. Builds nothing.

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
            f"{reference!r} names nothing in the testbed",
            hint=did_you_mean(name, list(NAMES), "names after `testbed:`"),
        )
    return name


def _cache_root(cache: Path | None) -> Path:
    if cache is not None:
        return cache
    configured = os.environ.get("STAYALIGNED_CACHE")
    return Path(configured) if configured else Path.home() / ".cache" / "stayaligned"
