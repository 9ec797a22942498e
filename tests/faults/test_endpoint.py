"""A server that breaks 3 replies in 10, and a killed judging process: no verdict is lost, duplicated or wrong."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
bench: Any = importlib.import_module("endpoint")
sys.path.pop(0)


@pytest.mark.parametrize(("judge", "count", "kills"), [("policy_rubric", 400, 2), ("strong_reject", 300, 0)])
def test_every_verdict_is_correct_and_none_is_requested_twice(
    judge: str, count: int, kills: int, tmp_path: Path
) -> None:
    seen = bench.run(judge, count, 32, tmp_path, kills=kills, timeout_seconds=1.5)
    assert seen.unscored >= 1
    assert len(seen.server["broken"]) == 14, "a kind of broken reply never occurred"
    assert seen.server["most_at_once"] > 8, "the requests were not concurrent"
