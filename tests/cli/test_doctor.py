"""`stayaligned doctor`: it names what makes a run fail, says nothing of a run that works, and keeps nothing."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from stayaligned.core.errors import StayalignedError
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
    monkeypatch.setattr(doctor, "measure_training", None)
    monkeypatch.setattr(doctor, "estimate_generation", None)
    code, shown = command("doctor", config, "--quick")
    assert (code, "not measured" in shown) == (0, True), shown


def test_without_a_configuration_it_looks_at_the_machine(command: Command) -> None:
    code, shown = command("doctor")
    assert (code, "torch" in shown, "CPU threads" in shown) == (0, True, True)


@pytest.mark.parametrize("load", [0.0, 64.0])
def test_a_busy_machine_is_noted(load: float, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.os, "getloadavg", lambda: (load, 0.0, 0.0))
    code, shown = command("doctor")
    assert (code, "measured times will be far too long" in " ".join(shown.split())) == (0, load > 0)


@pytest.mark.parametrize("content", [None, "{base: {}}", "["], ids=["missing", "another file", "no YAML"])
def test_what_is_no_configuration_is_not_a_diagnosis(content: str | None, tmp_path: Path, command: Command) -> None:
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
    monkeypatch.setattr(doctor, "measure_training", None)
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
    times = estimate.measure_training(one, lambda *_: None)
    found = estimate.estimate_trainings([(times, steps)])
    assert found.low < found.seconds < found.high
    assert "10 measured" in found.measured
    twice = estimate.estimate_trainings([(times, steps), (times, 2 * steps)])
    assert found.seconds < twice.seconds / 2 < 2 * found.seconds
    assert "2 trainings, 3000 steps, 10 measured" in twice.measured


def grid(world: Path, **method: Any) -> dict[str, Any]:
    methods = [{"label": "plain"}, {"label": "mixed", "defenses": [{"name": "mixing"}], **method}]
    return {"base": experiment(world), "axes": {"method": methods, "seed": [1, 2]}}


def test_each_arm_of_a_grid_is_checked_and_its_time_counted(world: Path, tmp_path: Path, command: Command) -> None:
    code, shown = command("doctor", write(tmp_path / "g.yaml", grid(world)), "--out", tmp_path)
    assert code == 0, shown
    for text in (
        "a valid grid: 2 arms, 4 experiments",
        "training: 32 rows",
        "safety rows are few (in 'mixed')",
        "4 trainings, 16 steps",
        "4 times ",
        "all 4 experiments: about",
    ):
        assert shown.count(text) == 1, (text, shown)


def test_what_fails_in_one_arm_of_a_grid_names_the_arm(world: Path, tmp_path: Path, command: Command) -> None:
    (tmp_path / "none.jsonl").write_text("")
    content = grid(world, alignment_data=str(tmp_path / "none.jsonl"))
    code, shown = command("doctor", write(tmp_path / "g.yaml", content), "--quick", "--out", tmp_path)
    failed = [line for line in shown.splitlines() if line.startswith("fail ")]
    assert (code, len(failed)) == (1, 1), shown
    assert failed[0].endswith("(in 'mixed')")


def test_an_alignment_is_checked_and_measured_and_nothing_is_kept(
    world: Path, tmp_path: Path, command: Command
) -> None:
    content = {"base_model": str(world / "base"), "data": str(world / "alignment.jsonl"), "max_length": 64}
    config = write(tmp_path / "a.yaml", {**content, "training": {"num_train_epochs": 2}})
    code, shown = command("doctor", config, "--out", tmp_path / "aligned")
    assert code == 0, shown
    assert "a valid alignment" in shown
    assert "training: about" in shown
    assert [path.name for path in tmp_path.iterdir()] == ["a.yaml"]
    code, shown = command("doctor", config, "data=nowhere.jsonl", "--quick")
    assert (code, "nowhere.jsonl does not exist" in shown) == (1, True), shown


def test_missing_packages_are_named_once(config: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise StayalignedError("not installed: zorb (for the model)", hint="pip install zorb")

    monkeypatch.setattr(doctor, "require_installed", refuse)
    monkeypatch.setattr(doctor._Doctor, "_find_tokenizer", refuse)
    code, shown = command("doctor", config)
    assert (code, shown.count("not installed: zorb")) == (1, 1), shown


def test_a_model_without_a_tokenizer_is_one_short_error(world: Path, tmp_path: Path, command: Command) -> None:
    shutil.copytree(world / "aligned", tmp_path / "aligned")
    for file in (tmp_path / "aligned").glob("tokenizer*"):
        file.unlink()
    content = experiment(world, model=str(tmp_path / "aligned"))
    code, shown = command("doctor", write(tmp_path / "e.yaml", content), "--quick")
    (failed,) = [line for line in shown.splitlines() if line.startswith("fail ")]
    assert code == 1
    assert failed.endswith("no tokenizer.json, and none can be made from its other files")
