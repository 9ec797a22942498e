"""`evaluate`, `judge` and `report`, killed at chosen moments or on a full disk, resume to the same bytes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from support.world import write_rows, write_world

JUDGE = '''
"""A judge that records what it judges, and that kills its process after a given number of verdicts."""

import os
import signal
from pathlib import Path
from typing import ClassVar

from stayaligned.evaluation.judges import Judge
from stayaligned.core.records import Outcome, Verdict


class Mortal(Judge):
    """Counts a completion as harmful if it has an even number of characters."""

    name: ClassVar[str] = "mortal"

    def judge(self, completions):
        asked = Path(os.environ["ASKED"])
        for done, row in enumerate(completions):
            if str(done) == os.environ.get("DIES_AFTER"):
                os.kill(os.getpid(), signal.SIGKILL)
            with asked.open("a") as stream:
                stream.write(f"{row.prompt_set} {row.id}\\\\n")
            outcome = Outcome.OTHER if len(row.text) % 2 else Outcome.HARM
            yield Verdict(id=row.id, prompt_set=row.prompt_set, judge=self.name, outcome=outcome)
'''
PRODUCTS = ("evidence.jsonl", "result.json", "results.csv")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_world(tmp_path_factory.mktemp("world"))
    (root / "mortal.py").write_text(JUDGE.replace("\\\\n", "\\n"))
    return root


def stayaligned(world: Path, *arguments: object, dies_after: int | None = None, killer: str = "") -> int:
    """The command in a process of its own; `killer` is a program that runs first in it."""
    program = f"import sys; sys.argv[0] = 'stayaligned'\n{killer}\nfrom stayaligned.cli import main\nmain()"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ASKED": str(world / "asked")}
    if dies_after is not None:
        environment["DIES_AFTER"] = str(dies_after)
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env=environment,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode in (0, 2, -signal.SIGKILL), done.stderr
    assert "Traceback" not in done.stderr
    return done.returncode


def evaluate(world: Path, out: Path, **how: object) -> int:
    prompts = ("--harmful-prompts", world / "harmful-prompts.jsonl", "--benign-prompts", world / "benign-prompts.jsonl")
    judge = ("--judge", "mortal", "--plugin", world / "mortal.py")
    settings = ("--out", out, "--label", "m", "generation.max_new_tokens=4")
    return stayaligned(world, "evaluate", world / "aligned", *prompts, *judge, *settings, **how)  # type: ignore[arg-type]


def products(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in PRODUCTS}


def test_killed_evaluate_judge_and_report_resume_to_the_same_bytes(world: Path, tmp_path: Path) -> None:
    asked = world / "asked"
    assert evaluate(world, tmp_path / "whole") == 0
    questions = asked.read_text().splitlines()
    assert len(questions) == len(set(questions)) == 11
    asked.unlink()

    in_writing = "import stayaligned.evaluation.results as r, os\nr.write_text = lambda *a: os.kill(os.getpid(), 9)"
    assert evaluate(world, tmp_path / "killed", dies_after=4) == -signal.SIGKILL
    assert not (tmp_path / "killed" / "result.json").exists()
    assert evaluate(world, tmp_path / "killed", dies_after=3) == -signal.SIGKILL
    assert evaluate(world, tmp_path / "killed", killer=in_writing) == -signal.SIGKILL
    assert evaluate(world, tmp_path / "killed") == 0
    assert sorted(asked.read_text().splitlines()) == sorted(questions), "nothing is asked twice"
    assert products(tmp_path / "killed") == products(tmp_path / "whole")

    second = ("--judge", "mortal", "--judge", "keyword", "--plugin", world / "mortal.py")
    (completions,) = tmp_path.glob("whole/stages/generate-*/completions.jsonl")
    asked.unlink()
    for out, death in (("a", None), ("b", 2), ("b", 5), ("b", None)):
        ended = stayaligned(world, "judge", completions, *second, "--out", tmp_path / out, dies_after=death)
        assert (ended == 0) == (death is None)
    assert products(tmp_path / "a") == products(tmp_path / "b")
    assert len(asked.read_text().splitlines()) == 22

    before = {p.name: p.read_bytes() for p in (tmp_path / "a").glob("report.*")}
    in_report = "import stayaligned.core.files as f, os\nf._sync = lambda *a: os.kill(os.getpid(), 9)"
    (tmp_path / "a" / "report.md").unlink()
    assert stayaligned(world, "report", tmp_path / "a", killer=in_report) == -signal.SIGKILL
    assert (tmp_path / "a" / "report.html").read_bytes() == before["report.html"]
    assert stayaligned(world, "report", tmp_path / "a") == 0
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").glob("report.*")} == before
    assert not list((tmp_path / "a").glob(".*.partial"))


def test_a_full_disk_loses_no_stored_verdict(world: Path, tmp_path: Path) -> None:
    rows = [
        {"id": str(i), "prompt_set": "harmful", "prompt": [{"role": "user", "content": f"zorb {i}"}], "text": "s" * i}
        for i in range(300)
    ]
    write_rows(tmp_path / "completions.jsonl", rows)
    command = ("judge", tmp_path / "completions.jsonl", "--judge", "mortal", "--plugin", world / "mortal.py")
    asked = world / "asked"
    asked.unlink(missing_ok=True)
    # The system refuses to let any file grow beyond this, as a full disk would.
    full = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))"
    assert stayaligned(world, *command, "--out", tmp_path / "full", killer=full) == 2
    first = len(asked.read_text().splitlines())
    assert 0 < first < 300
    assert stayaligned(world, *command, "--out", tmp_path / "full") == 0
    assert len(asked.read_text().splitlines()) - first in (300 - first, 300 - first + 1)
    assert stayaligned(world, *command, "--out", tmp_path / "whole") == 0
    assert products(tmp_path / "full") == products(tmp_path / "whole")
