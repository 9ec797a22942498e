"""Pairs of checkpoints that several tests read."""

from typing import Any

import pytest

from stayaligned.weights.checkpoints import Checkpoint
from support.checkpoints import PairOf, write_pair


@pytest.fixture(scope="session")
def pair_of(tmp_path_factory: pytest.TempPathFactory) -> PairOf:
    """(aligned, base) of an architecture; written once, only read."""
    made: dict[str, tuple[Checkpoint, Checkpoint]] = {}

    def make(architecture: str, **model: Any) -> tuple[Checkpoint, Checkpoint]:
        key = f"{architecture} {model}"
        if key not in made:
            made[key] = write_pair(tmp_path_factory.mktemp("pair"), architecture, **model)
        return made[key]

    return make
