"""Progress: a line at the start of each work and one a minute on a pipe, with time stamp, step, loss and time left."""

import io
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stayaligned.cli import progress
from stayaligned.cli.console import _SafeConsole
from stayaligned.experiments.config.experiment import Experiment
from stayaligned.experiments.jobs import Job

STAMP = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  "


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    stream = io.StringIO()
    monkeypatch.setattr(progress, "err", _SafeConsole(file=stream, width=80, highlight=False, markup=False))
    return lambda: stream.getvalue().splitlines()


def wait_for(condition: Callable[[], bool]) -> None:
    ends = time.monotonic() + 5
    while not condition() and time.monotonic() < ends:
        time.sleep(0.01)


def test_on_a_pipe_new_work_is_announced_at_once_and_old_work_is_not_repeated(printed: Any) -> None:
    with progress.status("starting") as report:
        for step in range(100):
            report("train lisa", step / 100, f"step {step} of 100, loss 1.5")
        report("generate harmful", 0.0)
    assert [re.fullmatch(f"{STAMP}(.*)", line)[1] for line in printed()] == [  # type: ignore[index]
        "train lisa: step 0 of 100, loss 1.5",
        "generate harmful",
    ]


def test_on_a_pipe_a_line_is_printed_regularly_even_if_nothing_is_reported(
    printed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_FIRST", 0.02)
    monkeypatch.setattr(progress, "_INTERVAL", 0.02)
    with progress.status("starting") as report:
        wait_for(lambda: bool(printed()))
        report("train lisa", 0.0)
        report("train lisa", 0.5, "step 50 of 100, loss 1.5")
        wait_for(lambda: len(printed()) > 4)
    assert re.fullmatch(f"{STAMP}starting", printed()[0])
    assert re.fullmatch(rf"{STAMP}train lisa: step 50 of 100, loss 1.5, 50%", printed()[-1])


@pytest.mark.parametrize(
    ("began_at", "share", "elapsed", "left"),
    [(0, 0.25, 20, "1 min"), (0.5, 0.75, 30, "30 s"), (0, 0.01, 100, "2 h 45 min"), (0.2, 0.2, 50, ""), (0, 1, 9, "")],
)
def test_the_time_left_follows_from_the_share_done_since_the_work_began(
    began_at: float, share: float, elapsed: float, left: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress.time, "monotonic", lambda: 1000.0)
    work = progress._Work("train", began_at)
    work.report(share, "")
    monkeypatch.setattr(progress.time, "monotonic", lambda: 1000.0 + elapsed)
    assert str(work).partition("%, ")[2] == (f"{left} left" if left else "")


def test_a_grid_on_a_pipe_prints_its_jobs_and_what_the_workers_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_FIRST", 0.02)
    monkeypatch.setattr(progress, "_INTERVAL", 0.05)
    stream = io.StringIO()
    lines = lambda: stream.getvalue().splitlines()  # noqa: E731
    console = _SafeConsole(file=stream, width=80, highlight=False, markup=False)
    with progress.GridProgress(console) as grid:
        grid.started(3)
        grid.progress(11, "sft, seed 1 · train sft", 0.5, "step 5 of 10, loss 2")
        grid.progress(12, "lisa, seed 1 · train lisa", 0.1)
        grid.finished("testbed, seed 1", None)
        grid.finished("sft, seed 1", "out of memory")
        wait_for(lambda: len(lines()) > 3)
    said = [line[21:] for line in lines()]
    assert said[:3] == ["3 jobs", "[1/3] testbed, seed 1: done", "[2/3] sft, seed 1: failed: out of memory"]
    assert re.fullmatch(r"2 of 3 jobs done, about 1 s left; lisa, seed 1 · train lisa: 10%.*", said[3]), said[3]


def test_jobs_of_two_arms_with_one_defense_and_seed_have_different_titles(tmp_path: Path) -> None:
    experiments = [
        Experiment.model_validate(
            {"model": "m", "training": None, "benign_prompts": "p.jsonl", "label": arm, "seed": 100}
        )
        for arm in ("clean", "poisoned")
    ]
    titles = [Job("train", arm.label, arm, tmp_path, 0).title for arm in experiments]
    assert titles == ["clean, seed 100, training", "poisoned, seed 100, training"]
