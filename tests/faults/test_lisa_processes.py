"""Lisa in two processes, as torchrun starts them: as in one, and killed and resumed as never killed."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file


def test_two_processes_train_as_one(forks: Callable[..., Any], tmp_path: Path) -> None:
    forks("split")
    one, two = (load_file(tmp_path / name / "end") for name in ("one", "two"))
    assert max((two[name] - weight).abs().max().item() for name, weight in one.items()) < 1e-5
    logs = [json.loads((tmp_path / name / "log.json").read_text())[0] for name in ("one", "two")]
    for key in ("alignment_loss", "finetuning_loss", "drift"):
        assert logs[1][key] == pytest.approx(logs[0][key], rel=1e-4), key
    assert (tmp_path / "two" / "checkpoint-7" / "lisa_anchor.safetensors").is_file()


def test_two_processes_killed_and_resumed_end_where_those_do_that_were_not(
    forks: Callable[..., Any], tmp_path: Path
) -> None:
    seed = random.SystemRandom().randrange(1 << 16)
    seen = forks("kill-group", seed).seen
    print(f"seed {seed}:", *seen, sep="\n")
    assert seen[0]["aim"] == "stalled"
    assert seen[-1]["to"] > 0, "nothing was resumed"
    assert (tmp_path / "whole" / "end").read_bytes() == (tmp_path / "killed" / "end").read_bytes()
