"""The process of `gate` ends with 0, 1 or 3 only if it decided, whatever ends it; signals reach it."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from support.runs import evidence, outcomes, write_run

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the gate runs in one process there")
Started = Callable[..., subprocess.Popen[str]]
C_EXIT = "import ctypes; ctypes.CDLL(None).exit({})"


@pytest.fixture
def started(tmp_path: Path) -> Started:
    """Start the gate on the candidate with a plug-in of the given source."""
    for name, harm in (("base", 8), ("same", 8), ("worse", 90)):
        write_run(tmp_path / name, evidence({"keyword": outcomes(400, harm)}))

    def start(source: str = "", candidate: str = "same") -> subprocess.Popen[str]:
        (tmp_path / "mine.py").write_text(source)
        arguments = ["--baseline", "base", "--candidate", candidate, "--max-harm-increase", "5%"]
        arguments += ["--plugin", "mine.py"] if source else []
        return subprocess.Popen(
            [sys.executable, "-m", "stayaligned", "gate", *arguments],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


@pytest.mark.parametrize(
    ("source", "code"),
    [
        (C_EXIT.format(1), 2),
        (C_EXIT.format(0), 2),
        ("import os; os._exit(1)", 2),
        ("import os; os._exit(3)", 2),
        ("import os; os.kill(os.getpid(), 9)", -signal.SIGKILL),
    ],
)
def test_a_library_that_ends_the_process_does_not_decide(source: str, code: int, started: Started) -> None:
    process = started(source)
    process.communicate(timeout=60)
    assert process.returncode == code


@pytest.mark.parametrize(("candidate", "code"), [("same", 0), ("worse", 1)])
def test_a_decision_is_the_exit_code_and_is_printed_once(candidate: str, code: int, started: Started) -> None:
    process = started(candidate=candidate)
    shown, _ = process.communicate(timeout=60)
    assert process.returncode == code
    assert shown.count("the candidate is within" if code == 0 else "FAIL:") == 1


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_a_signal_ends_the_gate(sent: signal.Signals, code: int, started: Started, tmp_path: Path) -> None:
    process = started("import pathlib, time; pathlib.Path('begun').touch(); time.sleep(60)")
    while not (tmp_path / "begun").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(sent)
    process.communicate(timeout=30)
    assert process.returncode == code


def test_the_console_script_is_the_guarded_entry() -> None:
    import tomllib

    content = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert content["project"]["scripts"] == {"stayaligned": "stayaligned.__main__:main"}
