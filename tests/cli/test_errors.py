"""Bad input is one clear error with exit code 2 that names the place, says what to do, and leaves nothing behind."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.world import experiment, write_rows

Change = Callable[[Path, dict[str, Any]], None]


def empty_rows(root: Path, content: dict[str, Any]) -> None:
    content["task"]["train"] = str(write_rows(root / "empty.jsonl", []))


def malformed_rows(root: Path, content: dict[str, Any]) -> None:
    (root / "bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", \n')
    content["task"]["train"] = str(root / "bad.jsonl")


def mixed_rows(root: Path, content: dict[str, Any]) -> None:
    rows = [{"prompt": "a", "completion": "b"}, {"instruction": "a", "output": "b"}]
    content["task"]["train"] = str(write_rows(root / "mixed.jsonl", rows))


def blank_rows(root: Path, content: dict[str, Any]) -> None:
    content["task"]["train"] = str(write_rows(root / "blank.jsonl", [{"prompt": "a", "completion": " "}] * 3))


def too_few_harmful(root: Path, content: dict[str, Any]) -> None:
    content["attack"].update(poison_ratio=0.9)


def unknown_model(root: Path, content: dict[str, Any]) -> None:
    content["model"] = str(root / "nowhere")


def empty_model(root: Path, content: dict[str, Any]) -> None:
    (root / "hollow").mkdir(exist_ok=True)
    content["model"] = str(root / "hollow")


def no_tokenizer(root: Path, content: dict[str, Any]) -> None:
    shutil.copytree(root / "aligned", root / "mute", dirs_exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (root / "mute" / name).unlink(missing_ok=True)
    content["model"] = str(root / "mute")


def no_template(root: Path, content: dict[str, Any]) -> None:
    shutil.copytree(root / "aligned", root / "plain", dirs_exist_ok=True)
    (root / "plain" / "chat_template.jinja").unlink(missing_ok=True)
    content["model"] = str(root / "plain")


def no_such_target(root: Path, content: dict[str, Any]) -> None:
    content["lora"] = {"target_modules": ["query_projection"]}


def no_such_setting(root: Path, content: dict[str, Any]) -> None:
    content["training"]["learning_rat"] = 1


def impossible_setting(root: Path, content: dict[str, Any]) -> None:
    content["training"]["learning_rate"] = "fast"


CASES: list[tuple[Change, tuple[str, ...]]] = [
    (empty_rows, ("empty.jsonl",)),
    (malformed_rows, ("bad.jsonl", "line 2")),
    (mixed_rows, ("mixed.jsonl", "line 2")),
    (blank_rows, ("blank.jsonl",)),
    (too_few_harmful, ("harmful.jsonl", "16")),
    (unknown_model, ("model", "nowhere")),
    (empty_model, ("hollow", "config.json")),
    (no_tokenizer, ("mute", "tokenizer")),
    (no_template, ("plain", "chat template")),
    (no_such_target, ("query_projection", "q_proj")),
    (no_such_setting, ("training.learning_rat", "learning_rate")),
    (impossible_setting, ("learning_rate",)),
]


@pytest.mark.parametrize(("change", "expected"), CASES, ids=lambda value: getattr(value, "__name__", ""))
def test_bad_input_is_one_error_and_leaves_no_result(
    world: Path,
    tmp_path: Path,
    command: Callable[..., tuple[int, str]],
    change: Change,
    expected: tuple[str, ...],
) -> None:
    content = experiment(world)
    change(world, content)
    config = tmp_path / "e.yaml"
    config.write_text(yaml.safe_dump(content))
    code, shown = command("run", config, "--out", tmp_path / "out")
    assert code == 2, shown
    assert shown.count("error: ") == 1
    assert "Traceback" not in shown
    for text in expected:
        assert text in shown
    assert not list(tmp_path.rglob("result.json"))
    assert not list(tmp_path.rglob("*.partial"))


def test_an_unknown_noun_lists_the_nouns(command: Callable[..., tuple[int, str]]) -> None:
    code, shown = command("list", "defence")
    assert code == 2
    assert "defense" in shown


def test_a_report_of_a_directory_without_results_is_an_error(
    tmp_path: Path, command: Callable[..., tuple[int, str]]
) -> None:
    code, shown = command("report", tmp_path)
    assert code == 2
    assert "holds no result.json" in shown


def test_control_characters_are_made_visible_on_the_terminal(
    world: Path, tmp_path: Path, command: Callable[..., tuple[int, str]]
) -> None:
    (tmp_path / "h.jsonl").write_text('{"pro\\u001b[31mmpt": "x"}\n')
    config = tmp_path / "e.yaml"
    config.write_text(yaml.safe_dump(experiment(world, harmful_prompts=str(tmp_path / "h.jsonl"))))
    code, shown = command("run", config, "--out", tmp_path / "out")
    assert code == 2
    assert "\x1b" not in shown
    assert "⟨U+001B⟩" in shown


def test_a_grid_in_which_every_experiment_fails_is_bad_input(
    world: Path, tmp_path: Path, command: Callable[..., tuple[int, str]]
) -> None:
    config = tmp_path / "g.yaml"
    config.write_text(yaml.safe_dump({"base": experiment(world), "axes": {"seed": [0]}}))
    code, shown = command("bench", config, "lora.target_modules=[nope]", "--out", tmp_path / "out", "--workers", "1")
    assert code == 2
    assert "nope" in shown
    code, _ = command("bench", config, "--out", tmp_path / "out", "--workers", "1")
    assert code == 0, "the fixed grid did not run in the same directory"
