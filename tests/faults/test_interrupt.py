"""Ctrl-C ends the command at once with a message and exit code 130, and the same command resumes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from support.world import experiment, write_world


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "stayaligned", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # A shell that starts pytest in the background makes it, and so its children, deaf to SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
        start_new_session=True,
    )


@pytest.mark.parametrize("command", ["run", "bench"])
def test_an_interrupted_command_reports_it_and_resumes(tmp_path: Path, command: str) -> None:
    world = write_world(tmp_path / "world")
    content = experiment(world)
    content["training"] |= {"max_steps": 100_000, "logging_steps": 50_000, "save_strategy": "no"}
    config, out = tmp_path / "c.yaml", tmp_path / "out"
    config.write_text(yaml.safe_dump(content if command == "run" else {"base": content, "axes": {"seed": [0, 1]}}))
    process = start(command, str(config), "--out", str(out))
    deadline = time.monotonic() + 60
    while not list(out.glob("stages/data-*")) and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    told, _ = process.communicate(timeout=30)
    assert process.returncode == 130, told
    assert "rerun the same command to continue" in told
    assert "Traceback" not in told
    with pytest.raises(ProcessLookupError):
        for _ in range(100):
            os.killpg(process.pid, 0)
            time.sleep(0.1)
    assert list(out.glob("stages/data-*"))
    assert not list(out.rglob("result.json"))
