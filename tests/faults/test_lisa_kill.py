"""A trainer that is killed at any moment, or whose disk is full, goes on to the weights of one that was let alone."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest


def assert_same_end(directory: Path) -> None:
    """Bit for bit: safetensors has one form."""
    assert (directory / "whole" / "end").read_bytes() == (directory / "killed" / "end").read_bytes()


@pytest.mark.parametrize("kind", ["lora", "sft"])
def test_killed_twenty_times_it_ends_in_the_same_weights(forks: Callable[..., Any], tmp_path: Path, kind: str) -> None:
    seed = random.SystemRandom().randrange(1 << 16)
    *kills, last = forks("kill", kind, seed).seen
    print(f"seed {seed}:", *kills, last, sep="\n")
    assert len(kills) == 20
    seen = Counter(kill["seen"] for kill in kills)
    assert seen["writing"] >= 3, "too few kills struck while a checkpoint was written"
    assert sum(kill["from"] > 0 for kill in kills) >= 10, "too few kills struck a resumed run"
    assert all(kill["from"] == before["to"] for before, kill in pairwise(kills))
    assert_same_end(tmp_path)


def test_a_full_disk_is_one_error_and_training_goes_on_when_there_is_room(
    forks: Callable[..., Any], tmp_path: Path
) -> None:
    """safetensors, Python and torch write the files, with three kinds of error."""
    forked = forks("fill-disk")
    for file, seen in forked.seen.items():
        assert seen == {"code": 2, "whole": 23, "begun": 24}, file
        assert f"{tmp_path / file / 'killed' / 'checkpoint-24'} can't be written: " in forked.stderr
        assert_same_end(tmp_path / file)
