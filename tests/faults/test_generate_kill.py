"""An evaluation killed while it generates resumes to the same bytes, and stores no completion twice."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from support.world import write_rows, write_world

# Kills its process after a given number of stored completions, and records each one.
KILLER = """
import os, signal
from stayaligned.evaluation.answers import Journal
store, count = Journal.store, 0
def counted(self, index, completion):
    global count
    if count == int(os.environ["DIES_AFTER"]):
        os.write(self._descriptor, b'{"index":')
        os.kill(os.getpid(), signal.SIGKILL)
    count += 1
    open(os.environ["KEPT"], "a").write(f"{completion.prompt_set} {index}\\n")
    store(self, index, completion)
Journal.store = counted
"""


def evaluate(world: Path, out: Path, dies_after: int, *more: str) -> int:
    program = f"import sys; sys.argv[0] = 'stayaligned'\n{KILLER}\nfrom stayaligned.cli import main\nmain()"
    prompts = ("--harmful-prompts", world / "harmful-prompts.jsonl", "--benign-prompts", world / "benign-prompts.jsonl")
    settings = ("--out", out, "--label", "m", "generation.max_new_tokens=12", "generation.temperature=1.0", *more)
    done = subprocess.run(
        [sys.executable, "-c", program, "evaluate", *map(str, (world / "aligned", *prompts, *settings))],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "KEPT": f"{out}.kept",
            "DIES_AFTER": str(dies_after),
        },
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode


def test_completions_survive_a_kill(tmp_path: Path) -> None:
    world = write_world(tmp_path / "world")
    write_rows(world / "harmful-prompts.jsonl", [{"prompt": f"zorb {i % 12} now"} for i in range(20)])
    assert evaluate(world, tmp_path / "whole", 1000) == 0
    assert evaluate(world, tmp_path / "killed", 7) == -signal.SIGKILL
    assert evaluate(world, tmp_path / "killed", 15) == -signal.SIGKILL
    assert evaluate(world, tmp_path / "killed", 1000) == 0
    kept = (tmp_path / "killed.kept").read_text().splitlines()
    assert len(kept) == len(set(kept)) == 25
    (one,), (two,) = ((tmp_path / name).glob("stages/generate-*/completions.jsonl") for name in ("whole", "killed"))
    assert one.read_bytes() == two.read_bytes()
    assert not list((tmp_path / "killed" / "stages").glob(".*"))


def test_sampled_completions_survive_a_kill(tmp_path: Path) -> None:
    world = write_world(tmp_path / "world")
    assert evaluate(world, tmp_path / "whole", 1000, "generation.samples=3") == 0
    assert evaluate(world, tmp_path / "killed", 13, "generation.samples=3") == -signal.SIGKILL
    assert evaluate(world, tmp_path / "killed", 1000, "generation.samples=3") == 0
    kept = (tmp_path / "killed.kept").read_text().splitlines()
    assert len(kept) == len(set(kept)) == 6 + 18 + 5
    (one,), (two,) = ((tmp_path / name).glob("stages/generate-*/completions.jsonl") for name in ("whole", "killed"))
    assert one.read_bytes() == two.read_bytes()
