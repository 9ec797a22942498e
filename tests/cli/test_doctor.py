"""`stayaligned doctor`: it names what makes a run fail, says nothing of a run that works, and keeps nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from stayaligned.experiments import doctor, estimate
from stayaligned.experiments.config.experiment import load_experiment
from stayaligned.experiments.preview import planned_steps
from support.bad_input import CASES
from support.world import experiment, write_rows

Command = Callable[..., tuple[int, str]]


def write(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def config(world: Path, tmp_path: Path) -> Path:
    return write(tmp_path / "e.yaml", experiment(world))


@pytest.mark.parametrize(("change", "expected"), CASES, ids=lambda value: getattr(value, "__name__", ""))
def test_what_makes_a_run_fail_is_found(
    change: Any, expected: tuple[str, ...], world: Path, tmp_path: Path, command: Command
) -> None:
    content = experiment(world)
    change(world, content)
    code, shown = command("doctor", write(tmp_path / "e.yaml", content), "--out", tmp_path)
    assert (code, "Traceback" in shown) == (1, False), shown
    failed = [line for line in shown.splitlines() if line.startswith("fail ")]
    assert failed, shown
    assert all(text in shown for text in expected), shown


def test_a_run_that_works_has_no_failure_and_nothing_is_kept(config: Path, command: Command) -> None:
    before = sorted(config.parent.rglob("*"))
    code, shown = command("doctor", config, "--out", config.parent / "new" / "out")
    assert code == 0, shown
    assert not [line for line in shown.splitlines() if line.startswith("fail ")]
    assert "training: about" in shown
    assert "generation: about" in shown
    assert sorted(config.parent.rglob("*")) == before


def test_quick_measures_nothing(config: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "estimate_training", None)
    monkeypatch.setattr(doctor, "estimate_generation", None)
    code, shown = command("doctor", config, "--quick")
    assert (code, "not measured" in shown) == (0, True), shown


def test_without_a_configuration_it_looks_at_the_machine(command: Command) -> None:
    code, shown = command("doctor")
    assert (code, "torch" in shown, "CPU threads" in shown) == (0, True, True)


@pytest.mark.parametrize("content", [None, "{base: {}, axes: {}}", "["], ids=["missing", "grid", "no YAML"])
def test_what_is_no_experiment_is_not_a_diagnosis(content: str | None, tmp_path: Path, command: Command) -> None:
    if content is not None:
        (tmp_path / "e.yaml").write_text(content)
    code, shown = command("doctor", tmp_path / "e.yaml")
    assert (code, shown.count("error: ")) == (2, 1), shown


def test_data_is_compared_with_length_prompts_and_placeholders(world: Path, tmp_path: Path, command: Command) -> None:
    content = experiment(world, max_length=8, defenses=[{"name": "mixing"}])
    content["harmful_prompts"] = str(write_rows(tmp_path / "h.jsonl", [{"prompt": "mood 3?"}, {"prompt": "zorb"}]))
    _, shown = command("doctor", write(tmp_path / "e.yaml", content), "--quick", "--out", tmp_path)
    for text in ("longer than max_length = 8", "1 of 2 harmful prompts also occur in the training data", "are few"):
        assert text in shown, shown
    rows = [{"prompt": "[replace this row] a", "completion": "b"}]
    content["alignment_data"] = str(write_rows(tmp_path / "s.jsonl", rows))
    code, shown = command("doctor", write(tmp_path / "e.yaml", content), "--quick", "--out", tmp_path)
    assert (code, "still the placeholder" in shown) == (1, True)


def test_a_base_model_that_is_the_model_is_noted(world: Path, tmp_path: Path, command: Command) -> None:
    content = experiment(world, base_model=str(world / "aligned"))
    _, shown = command("doctor", write(tmp_path / "e.yaml", content), "--quick", "--out", tmp_path)
    assert "is it the same model?" in shown


def test_too_little_memory_is_found_before_anything_is_loaded(
    config: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "available_memory", lambda: 1000)
    monkeypatch.setattr(doctor, "estimate_training", None)
    code, shown = command("doctor", config)
    assert (code, "needs at least" in shown) == (1, True), shown


def test_the_estimate_grows_with_the_steps_and_counts_a_cycle_of_lisa(world: Path, tmp_path: Path) -> None:
    lisa = {"name": "lisa", "alignment_steps": 10, "finetuning_steps": 90, "rho": 1}
    content = experiment(world, defenses=[lisa])
    content["training"]["max_steps"] = 1000
    one = load_experiment(write(tmp_path / "e.yaml", content))
    (short,) = [estimate._short_cycle(defense) for defense in one.defenses]
    assert (short.alignment_steps, short.finetuning_steps) == (1, 9)
    steps = planned_steps(one)
    assert steps == 1000
    found = estimate.estimate_training(one, steps, lambda *_: None)
    assert found.low < found.seconds < found.high
    assert "10 measured" in found.measured
