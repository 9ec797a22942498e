"""A training that is killed at any moment, or whose disk is full, resumes to the weights of an undisturbed one."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest


def assert_same_end(directory: Path) -> None:
    """Check that the final weights are equal byte for byte."""
    assert (directory / "whole" / "end").read_bytes() == (directory / "killed" / "end").read_bytes()


@pytest.mark.parametrize("kind", ["lora", "sft"])
def test_training_that_is_killed_twenty_times_ends_with_the_same_weights(
    forks: Callable[..., Any], tmp_path: Path, kind: str
) -> None:
    seed = random.SystemRandom().randrange(1 << 16)
    *kills, last = forks("kill", kind, seed).seen
    print(f"seed {seed}:", *kills, last, sep="\n")
    assert len(kills) == 20
    seen = Counter(kill["seen"] for kill in kills)
    assert seen["writing"] >= 3, "too few kills while a checkpoint was written"
    assert sum(kill["from"] > 0 for kill in kills) >= 10, "too few kills of a resumed run"
    assert all(kill["from"] == before["to"] for before, kill in pairwise(kills))
    assert_same_end(tmp_path)


def test_a_full_disk_is_one_error_and_training_resumes_when_space_is_free(
    forks: Callable[..., Any], tmp_path: Path
) -> None:
    """The files are written by safetensors, Python and torch, which raise three kinds of error."""
    forked = forks("fill-disk")
    for file, seen in forked.seen.items():
        assert seen == {"code": 2, "whole": 23, "begun": 24}, file
        assert f"{tmp_path / file / 'killed' / 'checkpoint-24'} can't be written: " in forked.stderr
        assert_same_end(tmp_path / file)
