"""Defenses that change the loss, the gradient or the weights, in two processes: the same as in one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

TESTS = Path(__file__).parents[1]


@pytest.mark.slow
def test_two_processes_train_like_one(tmp_path: Path) -> None:
    program = str(TESTS / "support" / "objective_processes.py")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *filter(None, sys.path)])}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for name, before in (("one", []), ("two", launcher)):
        command = [sys.executable, *before, program, str(tmp_path / name)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    one, first, second = (load_file(tmp_path / name) for name in ("one-0", "two-0", "two-1"))
    assert one
    for name, weight in one.items():
        assert (first[name] - weight).abs().max().item() < 1e-6, name
        assert second[name].equal(first[name]), name
