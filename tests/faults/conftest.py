"""Trains, kills and resumes in forks of one process that has imported torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

PROGRAM = Path(__file__).parents[1] / "support" / "forks.py"


class Forked(NamedTuple):
    seen: Any
    stderr: str


@pytest.fixture
def forks(tmp_path: Path) -> Callable[..., Forked]:
    """Runs a command of `support/forks.py` in the temporary directory."""

    def run(command: str, *arguments: object) -> Forked:
        done = subprocess.run(
            [sys.executable, str(PROGRAM), command, str(tmp_path), *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=240,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return Forked(json.loads(done.stdout), done.stderr)

    return run
