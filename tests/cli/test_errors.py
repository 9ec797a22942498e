"""Bad input is one clear error with exit code 2: it names the thing, says what to do, and leaves nothing behind."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from stayaligned.cli import main
from stayaligned_test_world import experiment, write_rows, write_world

Change = Callable[[Path, dict[str, Any]], None]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["stayaligned", *map(str, arguments)])
        try:
            main()
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 0
        else:
            code = 0
        shown = capsys.readouterr()
        return code, shown.out + shown.err

    return run


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


def test_an_adapter_of_another_base_is_refused(
    world: Path, tmp_path: Path, command: Callable[..., tuple[int, str]]
) -> None:
    from stayaligned.hf.models import attach_lora
    from stayaligned.testing import pico_model

    other = attach_lora(pico_model(hidden_size=64), {"target_modules": ["q_proj"]})
    other.save_pretrained(str(tmp_path / "adapter"))
    code, shown = command(
        "project",
        tmp_path / "adapter",
        "--aligned",
        world / "aligned",
        "--base",
        world / "base",
        "--out",
        tmp_path / "new",
        "--all",
    )
    assert code == 2
    assert "q_proj" in shown
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "selection", [[], ["--all", "--lowest", "1"], ["--threshold", "0.1", "--all"]], ids=["none", "two", "other two"]
)
def test_project_needs_to_know_which_layers(
    world: Path, tmp_path: Path, command: Callable[..., tuple[int, str]], selection: list[str]
) -> None:
    code, shown = command(
        "project",
        tmp_path,
        "--aligned",
        world / "aligned",
        "--base",
        world / "base",
        "--out",
        tmp_path / "n",
        *selection,
    )
    assert code == 2
    assert "exactly one of --threshold T, --lowest K and --all" in shown


def test_project_writes_an_adapter_and_says_what_it_did(
    world: Path, tmp_path: Path, command: Callable[..., tuple[int, str]]
) -> None:
    from stayaligned.hf.models import attach_lora, load_model

    config = {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    attach_lora(load_model(world / "aligned"), config).save_pretrained(str(tmp_path / "adapter"))
    models = ["--aligned", world / "aligned", "--base", world / "base"]
    for name, options in {
        "c": ["--lowest", "2"],
        "o": ["--all", "--operator", "orthogonal", "--rank", "4"],
        "k": ["--all", "--operator", "complement", "--rank", "4", "--side", "left"],
        "s": ["--all", "--operator", "complement", "--rank", "4", "--control", "shrink"],
        "r": ["--all", "--operator", "complement", "--rank", "4", "--control", "random"],
        "d": ["--lowest", "3", "--control", "drop"],
    }.items():
        code, shown = command("project", tmp_path / "adapter", *models, "--out", tmp_path / name, *options)
        assert code == 0, shown
        record = json.loads((tmp_path / name / "projection.json").read_text())
        changed = sum(layer["selected"] for layer in record["layers"])
        assert f"{changed} of 4 layers changed" in shown
        assert changed == (int(options[1]) if options[0] == "--lowest" else 4)
        assert record["command"][:2] == ["stayaligned", "project"]


def test_an_unknown_noun_lists_the_nouns(command: Callable[..., tuple[int, str]]) -> None:
    code, shown = command("list", "defence")
    assert code == 2
    assert "defense" in shown


def test_report_of_a_directory_without_results_is_refused(
    tmp_path: Path, command: Callable[..., tuple[int, str]]
) -> None:
    code, shown = command("report", tmp_path)
    assert code == 2
    assert "holds no result.json" in shown


def test_hostile_text_reaches_the_terminal_as_text(
    world: Path, tmp_path: Path, command: Callable[..., tuple[int, str]]
) -> None:
    (tmp_path / "h.jsonl").write_text('{"pro\\u001b[31mmpt": "x"}\n')
    config = tmp_path / "e.yaml"
    config.write_text(yaml.safe_dump(experiment(world, harmful_prompts=str(tmp_path / "h.jsonl"))))
    code, shown = command("run", config, "--out", tmp_path / "out")
    assert code == 2
    assert "\x1b" not in shown
    assert "⟨U+001B⟩" in shown


def test_a_grid_of_which_nothing_succeeds_is_bad_input(
    world: Path, tmp_path: Path, command: Callable[..., tuple[int, str]]
) -> None:
    config = tmp_path / "g.yaml"
    config.write_text(yaml.safe_dump({"base": experiment(world), "axes": {"seed": [0]}}))
    code, shown = command("bench", config, "lora.target_modules=[nope]", "--out", tmp_path / "out", "--workers", "1")
    assert code == 2
    assert "nope" in shown
    code, _ = command("bench", config, "--out", tmp_path / "out", "--workers", "1")
    assert code == 0, "mended in place"
