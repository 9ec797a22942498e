"""Bad input is one clear error with exit code 2 that names the place, says what to do, and leaves nothing behind."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from support.bad_input import CASES, Change
from support.world import experiment


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


@pytest.mark.slow
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
