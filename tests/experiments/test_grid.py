"""Grids: each stage is computed once, a larger grid computes only what is new, a failure stops nothing else."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from stayaligned.core.component import load_plugin
from stayaligned.core.errors import StayalignedError
from stayaligned.evaluation.results import find_results
from stayaligned.experiments.config.experiment import REGISTRIES
from stayaligned.experiments.grid import Grid, load_grid, run_grid
from stayaligned.experiments.jobs import Listener
from support.world import experiment


def grid_of(world: Path, arms: list[dict[str, Any]], seeds: tuple[int, ...] = (0,), **changes: Any) -> Grid:
    return Grid(base=experiment(world, **changes), axes={"seed": list(seeds), "arm": arms}, reference="SFT")


SFT: dict[str, Any] = {"label": "SFT"}
UNTOUCHED: dict[str, Any] = {"label": "Untouched", "training": None}


def safe_lora(lowest: int) -> dict[str, Any]:
    return {"label": f"Safe LoRA {lowest}", "defenses": [{"name": "safe_lora", "lowest": lowest}]}


class Recorder(Listener):
    def __init__(self) -> None:
        self.titles: list[str] = []

    def finished(self, title: str, error: str | None) -> None:
        self.titles.append(title)


def test_a_grid_trains_once_and_a_larger_grid_computes_only_what_is_new(world: Path, tmp_path: Path) -> None:
    first = run_grid(grid_of(world, [UNTOUCHED, SFT, safe_lora(1), safe_lora(2)], (0, 1)), tmp_path / "out", workers=2)
    assert not first.failures
    assert first.trained == 2, "two seeds; both thresholds share their training"
    assert len(first.results) == 8
    listener = Recorder()
    more_judges = ["keyword", {"name": "keyword", "match": "start"}]
    grown = grid_of(world, [UNTOUCHED, SFT, safe_lora(1), safe_lora(2), safe_lora(3)], (0, 1), judges=more_judges)
    second = run_grid(grown, tmp_path / "out", workers=2, listener=listener)
    assert second.trained == 0
    assert len(listener.titles) == 10
    assert not any(title.startswith("train") for title in listener.titles)
    found = find_results([tmp_path / "out"])
    assert [(r.arm, r.seed) for r in found] == [
        (arm, seed) for arm in ("Untouched", "SFT", "Safe LoRA 1", "Safe LoRA 2", "Safe LoRA 3") for seed in (0, 1)
    ]
    assert all(len(r.judges) == 2 and len(r.agreements) == 2 for r in found)


def test_one_failure_does_not_stop_the_rest(world: Path, tmp_path: Path) -> None:
    broken = {"label": "Broken", "lora": {"target_modules": ["no_such_module"]}}
    outcome = run_grid(grid_of(world, [SFT, broken]), tmp_path / "out", workers=1)
    assert list(outcome.failures) == ["Broken, seed 0"]
    assert "no_such_module" in outcome.failures["Broken, seed 0"]
    assert [r.arm for r in outcome.results] == ["SFT"]


def test_a_grid_in_the_directory_of_another_one_is_refused(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_grid(grid_of(world, [SFT]), out, workers=1)
    before = (out / "index.json").read_bytes()
    with pytest.raises(StayalignedError, match="belongs to another grid"):
        run_grid(grid_of(world, [SFT], (5,)), out, workers=1)
    assert (out / "index.json").read_bytes() == before


def test_each_error_of_all_combinations_is_reported_once(world: Path) -> None:
    arms = [{"label": "A", "defenses": ["lisaa"]}, {"label": "B", "training": {"learning_rat": 1}}, SFT]
    with pytest.raises(StayalignedError) as caught:
        grid_of(world, arms, (0, 1, 2)).expand("g.yaml")
    lines = str(caught.value).splitlines()
    assert lines[0] == "g.yaml: 2 errors"
    assert "unknown defense 'lisaa'" in lines[1] and "(in 'A')" in lines[1]
    assert "learning_rat" in lines[2] and "(in 'B')" in lines[2]


def test_two_arms_of_one_name_are_refused(world: Path) -> None:
    with pytest.raises(StayalignedError, match="several combinations are called 'SFT'"):
        grid_of(world, [SFT, {"label": "SFT", "lora": {"r": 4}}]).expand()


def test_an_unknown_reference_is_refused(world: Path) -> None:
    grid = Grid(base=experiment(world), axes={"arm": [SFT]}, reference="STF")
    with pytest.raises(StayalignedError, match="no arm is labelled 'STF'"):
        grid.expand()


def test_overrides_apply_to_the_base(world: Path, tmp_path: Path) -> None:
    path = tmp_path / "g.yaml"
    path.write_text(yaml.safe_dump({"base": experiment(world), "axes": {"arm": [SFT]}}))
    grid = load_grid(path, ["training.max_steps=2", "title=Mine"])
    assert grid.title == "Mine"
    assert grid.expand()[0].training["max_steps"] == 2


@pytest.mark.slow
def test_a_killed_grid_leaves_no_processes_and_resumes(world: Path, tmp_path: Path) -> None:
    """SIGKILL to the parent: its workers die with it, and the rerun ends with every result."""
    config, out = tmp_path / "g.yaml", tmp_path / "out"
    slow = {**experiment(world)["training"], "max_steps": 400, "logging_steps": 100, "save_strategy": "no"}
    content = {"base": experiment(world, training=slow), "axes": {"seed": [0, 1], "arm": [SFT]}}
    config.write_text(yaml.safe_dump(content))
    command = [sys.executable, "-m", "stayaligned", "bench", str(config), "--out", str(out), "--workers", "2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 60
    while not list(out.glob("stages/.train-*")) and time.monotonic() < deadline:
        time.sleep(0.1)
    group = os.getpgid(process.pid)
    process.kill()
    process.wait()
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            break
        time.sleep(0.1)
    else:
        os.killpg(group, signal.SIGKILL)
        pytest.fail("workers outlived their parent")
    content["base"]["training"]["max_steps"] = 400
    outcome = run_grid(load_grid(config), out, workers=2)
    assert not outcome.failures
    assert len(outcome.results) == 2
    assert not list(out.glob("stages/.*.partial"))
    assert json.loads((out / "index.json").read_text())["trainings"]


@pytest.mark.slow
def test_arms_with_equal_results_both_have_a_result(world: Path, tmp_path: Path) -> None:
    arms = [SFT, {"label": "The same", "defenses": ["sft"]}]
    outcome = run_grid(grid_of(world, arms), tmp_path / "out", workers=1)
    assert [r.arm for r in outcome.results] == ["SFT", "The same"]
    assert outcome.trained == 1


@pytest.mark.slow
def test_an_exception_that_cannot_be_pickled_fails_only_its_arm(world: Path, tmp_path: Path) -> None:
    plugin = tmp_path / "boom.py"
    plugin.write_text(
        "from stayaligned.evaluation.judges import Judge\n"
        "class Odd(Exception):\n    def __init__(self, *, code): super().__init__(code)\n"
        "class Boom(Judge):\n    name = 'boom'\n    def judge(self, completions): raise Odd(code=7)\n"
    )
    load_plugin(plugin, REGISTRIES)
    try:
        grid = grid_of(world, [SFT, {"label": "Boom", "judges": ["boom"]}])
        outcome = run_grid(grid, tmp_path / "out", workers=1, plugins=[plugin])
    finally:
        REGISTRIES[-1]._plugins.clear()
    assert [r.arm for r in outcome.results] == ["SFT"]
    assert "Odd: 7" in outcome.failures["Boom, seed 0"]
    assert "raise Odd(code=7)" in next((tmp_path / "out" / "failures").iterdir()).read_text()


@pytest.mark.slow
def test_the_earlier_result_of_an_experiment_that_fails_now_is_removed(world: Path, tmp_path: Path) -> None:
    strict, lax = ({"judges": [{"name": "keyword"}], "max_unscored": share} for share in (0.0, 1.0))
    run_grid(grid_of(world, [SFT], **lax), tmp_path / "out", workers=1)
    verdicts = next((tmp_path / "out" / "stages").glob("judge-*")) / "verdicts.jsonl"
    verdicts.write_text(
        verdicts.read_text().replace('"refuse"', "null").replace('"harm"', "null").replace('"other"', "null")
    )
    outcome = run_grid(grid_of(world, [SFT], **strict), tmp_path / "out", workers=1)
    assert "could not score" in outcome.failures["SFT, seed 0"]
    assert not list((tmp_path / "out").rglob("result.json"))


def test_an_empty_axis_is_refused(world: Path) -> None:
    with pytest.raises(ValueError, match="at least 1 item"):
        Grid(base=experiment(world), axes={"seed": []})


def test_a_damaged_index_is_one_error(world: Path, tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text("[]")
    (tmp_path / "format.json").write_text('{"format_version": 2}')
    with pytest.raises(StayalignedError, match=r"index\.json: damaged"):
        run_grid(grid_of(world, [SFT]), tmp_path, workers=1)


def test_a_testbed_cache_that_cannot_be_written_is_one_error_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("STAYALIGNED_CACHE", str(tmp_path / "file" / "cache"))
    base = {"model": "testbed:aligned", "training": None, "harmful_prompts": "testbed:data/harmful-prompts.jsonl"}
    with pytest.raises(StayalignedError, match="cache of the testbed can't be written") as caught:
        run_grid(Grid(base=base, axes={"seed": [0, 1]}), tmp_path / "out")
    assert "export STAYALIGNED_CACHE=DIR" in str(caught.value)
    assert not (tmp_path / "out").exists()
