"""`stayaligned init`: what it writes is valid, each answer is checked at once, and nothing is replaced or left half."""

import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from stayaligned.core.errors import StayalignedError
from stayaligned.data.sources import read_examples
from stayaligned.experiments import starting
from stayaligned.experiments.config.experiment import load_experiment
from stayaligned.experiments.preview import preview_training
from support.world import write_rows

Command = Callable[..., tuple[int, str]]


def given(world: Path, **changes: str) -> list[str]:
    answers = {"model": str(world / "aligned"), "data": str(world / "train.jsonl"), **changes}
    return [word for name, value in answers.items() for word in (f"--{name.replace('_', '-')}", value)]


@pytest.mark.parametrize("defense", starting.CHOICES)
@pytest.mark.parametrize("safety", [starting.NEW, "alignment.jsonl"])
def test_what_it_writes_is_valid_and_complete(
    defense: str, safety: str, world: Path, tmp_path: Path, command: Command
) -> None:
    own = safety if safety == starting.NEW else str(world / safety)
    base = {"base_model": str(world / "base")} if starting.needs_base(defense) else {}
    code, shown = command("init", tmp_path / "new", *given(world, defense=defense, safety=own, **base))
    assert code == 0, shown
    code, shown = command("validate", tmp_path / "new" / "experiment.yaml")
    assert (code, "a valid experiment" in shown) == (0, True), shown
    experiment = load_experiment(tmp_path / "new" / "experiment.yaml")
    assert [one.name for one in experiment.defenses] == [defense]
    assert list(preview_training(experiment)) == []
    assert (tmp_path / "new" / "safety.jsonl").exists() == (safety == starting.NEW)


def test_placeholders_are_refused_and_own_rows_are_read(world: Path, tmp_path: Path, command: Command) -> None:
    command("init", tmp_path, *given(world))
    safety = tmp_path / "safety.jsonl"
    with pytest.raises(StayalignedError, match=r"safety\.jsonl, line 1: still the placeholder"):
        read_examples(str(safety), origin="alignment")
    lines = safety.read_text().splitlines()
    safety.write_text('{"prompt": "flarn?", "completion": "I cannot"}\n' + lines[1] + "\n")
    code, shown = command("align", world / "base", "--data", safety, "--out", tmp_path / "out")
    assert (code, "line 2: still the placeholder" in shown, (tmp_path / "out").exists()) == (2, True, False)
    safety.write_text(safety.read_text().replace(starting.PLACEHOLDER, ""))
    assert len(read_examples(str(safety), origin="alignment")) == 2


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model": "./nowhere"}, ("--model", "no such directory")),
        ({"model": "WORLD"}, ("--model", "config.json")),
        ({"data": "WORLD/nowhere.jsonl"}, ("--data", "nowhere.jsonl")),
        ({"data": "WORLD/empty.jsonl"}, ("--data", "no rows")),
        ({"safety": "WORLD/prompts.jsonl"}, ("--safety", "no completion to learn")),
        ({"defense": "lsia"}, ("--defense", "lisa")),
        ({"judge": "keywrod"}, ("--judge", "keyword")),
        ({"defense": "safe_lora"}, ("--base-model", "no terminal")),
    ],
    ids=lambda value: "" if isinstance(value, tuple) else "-".join(value),
)
def test_a_wrong_answer_is_one_error_and_nothing_is_written(
    changes: dict[str, str], expected: tuple[str, ...], world: Path, tmp_path: Path, command: Command
) -> None:
    write_rows(world / "empty.jsonl", [])
    write_rows(world / "prompts.jsonl", [{"prompt": "zorb"}])
    changes = {name: value.replace("WORLD", str(world)) for name, value in changes.items()}
    code, shown = command("init", tmp_path / "new", *given(world, **changes), "--yes")
    assert (code, shown.count("error: "), (tmp_path / "new").exists()) == (2, 1, False), shown
    assert all(text in shown for text in expected), shown


@pytest.mark.parametrize("name", ["experiment.yaml", "safety.jsonl"])
def test_no_file_is_replaced(name: str, world: Path, tmp_path: Path, command: Command) -> None:
    (tmp_path / name).write_text("mine")
    code, shown = command("init", tmp_path, *given(world))
    assert (code, f"{name} exists already" in shown) == (2, True)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "mine")]


def test_an_interrupt_between_the_files_leaves_none(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = starting.write_text

    def interrupted(path: Path, text: str) -> None:
        write(path, text)
        if path.name == "experiment.yaml":
            raise KeyboardInterrupt

    monkeypatch.setattr(starting, "write_text", interrupted)
    answers = starting.Answers(str(world / "aligned"), str(world / "train.jsonl"), starting.NEW, "lisa", "keyword")
    with pytest.raises(KeyboardInterrupt):
        starting.write_start(answers, tmp_path)
    assert not [*tmp_path.iterdir()]


def on_terminal(directory: Path, typed: bytes, *arguments: str) -> tuple[int, str]:
    """Run `init` with a terminal for all streams, and type."""
    ours, theirs = pty.openpty()
    program = "import sys; from stayaligned.cli import main; sys.argv[0] = 'stayaligned'; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", program, "init", *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=directory,
        start_new_session=True,
    )
    os.close(theirs)
    os.write(ours, typed)
    shown = b""
    try:
        while part := os.read(ours, 4096):
            shown += part
    except OSError:  # the other end is closed
        pass
    os.close(ours)
    return process.wait(60), shown.decode()


def test_it_asks_checks_each_answer_at_once_and_asks_again(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    typed = f"{world}/nowhere\n{world}/aligned\n{world}/train.jsonl\n\nlsia\nmixing\n\n"
    code, shown = on_terminal(tmp_path, typed.encode())
    assert code == 0, shown
    assert shown.index("no such directory") < shown.index("What do you fine-tune it on")
    assert shown.count("Which defense") == 2
    experiment = load_experiment(tmp_path / "experiment.yaml")
    assert ([one.name for one in experiment.defenses], [one.name for one in experiment.judges]) == (
        ["mixing"],
        ["keyword"],
    )


def test_a_terminal_that_ends_leaves_nothing(world: Path, tmp_path: Path) -> None:
    code, shown = on_terminal(tmp_path, f"{world}/aligned\n\x04".encode())
    assert (code, [*tmp_path.iterdir()]) == (130, []), shown
    assert "Traceback" not in shown
