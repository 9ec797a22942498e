"""`--json` and `--quiet` of every command: what each stream gets, for answers and for errors."""

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from stayaligned.cli import _COMMANDS, app, main
from stayaligned.defenses.patching.subspace import build_subspace
from stayaligned.evaluation.labelling.drawing import open_labelling, read_frame
from stayaligned.experiments.grid import load_grid
from stayaligned.testing import write_pico_adapter
from support.labels import label_all, write_judged_run
from support.runs import H, R, evidence, write_run
from support.world import experiment, write_world

Run = Callable[..., tuple[int, str, str]]

COMMANDS: dict[str, tuple[str, ...]] = {
    "init": ("init", "NEW", "--model", "aligned", "--data", "train.jsonl", "--yes"),
    "run": ("run", "e.yaml", "--out", "out-run"),
    "bench": ("bench", "g.yaml", "--out", "out-bench", "--workers", "1"),
    "demo": ("demo", "--out", "out-demo", "--workers", "1"),
    "report": ("report", "RUN", "OTHER", "--out", "out-report"),
    "evaluate": ("evaluate", "aligned", "--harmful-prompts", "harmful-prompts.jsonl", "--out", "out-evaluate"),
    "judge": ("judge", "out-evaluate", "--judge", "keyword", "--out", "out-judge"),
    "label": ("label", "JUDGED", "--out", "out-label", "--summary"),
    "gate": ("gate", "--baseline", "RUN", "--candidate", "OTHER", "--max-harm-increase", "5%"),
    "power": ("power", "--rate", "5%", "--prompts", "400"),
    "align": ("align", "base", "--data", "alignment.jsonl", "training.max_steps=2", "max_length=64", "--out", "out-al"),
    "project": ("project", "adapter", "--aligned", "aligned", "--base", "base", "--all", "--out", "NEW"),
    "curvature": ("curvature", "aligned", "--data", "train.jsonl", "--iterations", "4", "--rows", "2"),
    "validate": ("validate", "e.yaml"),
    "doctor": ("doctor", "e.yaml", "--quick"),
    "list": ("list",),
    "show": ("show", "defense", "lisa"),
    "new": ("new", "judge", "zorbjudge", "--dir", "NEW"),
    "env": ("env",),
    "subspace-build": ("subspace", "build", "--aligned", "aligned", "--base", "base", "--rank", "1", "--out", "NEW"),
    "subspace-show": ("subspace", "show", "file.safetensors"),
}
"""A call of each command in the world below, in an order in which each finds its input; NEW is a new path."""
ANSWERED = [pytest.param(name, marks=pytest.mark.slow) if name in ("bench", "demo") else name for name in COMMANDS]
"""The names; commands that start processes are slow."""
ANSWERLESS = {"init", "new"}
"""Commands that only write files: their text answer is empty."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_world(tmp_path_factory.mktemp("modes"))
    write_pico_adapter(root / "adapter", root / "aligned", r=2)
    build_subspace(str(root / "aligned"), str(root / "base"), root / "file.safetensors", rank=1)
    write_run(root / "RUN", evidence({"keyword": [H, R] * 20}), arm="zörb − ≠ 模型")
    write_run(root / "OTHER", evidence({"keyword": [R] * 40}), arm="wüg")
    judged = write_judged_run(root / "JUDGED", {"keyword": [H, R] * 4}, arm="wüg")
    label_all(open_labelling(root / "out-label", read_frame([judged])), 0, "harm")
    settings = experiment(root, limit=2)
    settings["training"]["max_steps"] = 1
    (root / "e.yaml").write_text(yaml.safe_dump(settings))
    (root / "g.yaml").write_text(yaml.safe_dump({"base": settings, "axes": {"seed": [0]}}))
    return root


@pytest.fixture
def call(world: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command in the world, on streams of ASCII, and return its exit code, stdout and stderr."""
    grid = load_grid(world / "g.yaml")
    monkeypatch.chdir(world)
    monkeypatch.setattr("stayaligned.experiments.grid.load_grid", lambda *_: grid)

    def run(*arguments: str) -> tuple[int, str, str]:
        new = world / f"new-{len([*world.glob('new-*')])}"
        if arguments[0] == "new":
            new.mkdir()
        streams = [io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict") for _ in range(2)]
        monkeypatch.setattr("sys.argv", ["stayaligned", *(a.replace("NEW", str(new)) for a in arguments)])
        monkeypatch.setattr("sys.stdout", streams[0])
        monkeypatch.setattr("sys.stderr", streams[1])
        code: Any = 0
        try:
            main()
        except SystemExit as ended:
            code = ended.code or 0
        for stream in streams:
            stream.flush()
        shown = [stream.buffer.getvalue().decode() for stream in streams]  # type: ignore[attr-defined]
        return code, shown[0], shown[1]

    return run


def test_every_command_is_called_below() -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    names = [
        f"{name}-{sub}" if sub else name
        for name in _COMMANDS
        for sub in getattr(commands[name], "commands", {"": None})
    ]
    assert [*COMMANDS] == names


@pytest.mark.parametrize("name", ANSWERED)
def test_stdout_has_the_answer_alone_as_text_or_as_one_document(name: str, call: Run) -> None:
    code, text, notes = call(*COMMANDS[name])
    assert code in (0, 1, 3), notes
    again, quiet, nothing = call(*COMMANDS[name], "--quiet")
    assert (again, nothing) == (code, "")
    assert bool(quiet) == bool(text) == (name not in ANSWERLESS)
    if "NEW" not in COMMANDS[name] and name != "align":  # which says that it found what is finished
        changing = r"[\d.]+ GB"  # of `doctor`: what is free at this moment
        assert re.sub(changing, "", quiet) == re.sub(changing, "", text)
    again, shown, _ = call(*COMMANDS[name], "--json")
    document = json.loads(shown)
    assert (again, document["schema"]) == (code, f"stayaligned.{name}/1")
    assert shown.isascii()
    assert len(document) > 3 or name in ANSWERLESS, "no field of the answer"
    assert all(f"note: {note}".splitlines()[0] for note in document["notes"])
    assert {Path(file).exists() for file in document["files"]} <= {True}
    again, bare, nothing = call(*COMMANDS[name], "--json", "-q")
    assert (again, nothing, json.loads(bare)["schema"]) == (code, "", document["schema"])


@pytest.mark.parametrize("name", COMMANDS)
def test_an_error_is_a_document_too_and_is_printed_with_quiet(name: str, call: Run) -> None:
    wrong = (*COMMANDS[name][: 1 + name.startswith("subspace")], "--no-such-option")
    code, shown, said = call(*wrong, "--json", "--quiet")
    document = json.loads(shown)
    assert (code, document["schema"], document["command"]) == (2, "stayaligned.error/1", name)
    assert document["error"]["exit_code"] == 2
    assert "--no-such-option" in document["error"]["message"]
    assert document["error"]["message"] in said


def test_an_error_names_message_hint_and_page(call: Run) -> None:
    code, shown, said = call("judge", "nowhere", "--judge", "keyword", "--out", "x", "--json")
    error = json.loads(shown)["error"]
    assert (code, error["exit_code"]) == (2, 2)
    assert [line.partition(": ")[0] for line in said.splitlines()][-3:] == ["error", "hint", "docs"]
    assert all(error[key] in said for key in ("message", "hint", "docs"))


def test_the_error_of_a_program_is_a_document_too(call: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stayaligned.core.provenance.versions", lambda: {}["zorb"])
    with pytest.raises(KeyError, match="zorb"):
        call("env", "--json")
    shown = sys.stdout.buffer.getvalue().decode() if sys.stdout.flush() is None else ""  # type: ignore[attr-defined]
    assert json.loads(shown)["error"] == {
        "message": "KeyError: 'zorb'", "hint": None, "docs": None, "exit_code": 1
    }  # fmt: skip


def test_the_gate_writes_its_file_or_its_document(call: Run, world: Path) -> None:
    code, text, _ = call(*COMMANDS["gate"], "--json", "gate.json")
    written = json.loads((world / "gate.json").read_text())
    assert (code, text.startswith("{")) == (0, False)
    for form in (["--json"], ["--json", "--explain"], ["--json", "-"]):
        code, shown, _ = call(*COMMANDS["gate"], *form)
        document = json.loads(shown)
        assert (code, document["answer"], document["criteria"]) == (0, written["answer"], written["criteria"])


TALKATIVE = """
import os, warnings
from stayaligned import Judge
class Zorb(Judge):
    name = "zorbtalks"
    def judge(self, completions):
        return []
print("a plug-in prints")
os.write(1, b"a library writes\\n")
warnings.warn("zorb warns", UserWarning)
"""


def run_apart(directory: Path, *arguments: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    program = "import sys; from stayaligned.cli import main; sys.argv[0] = 'stayaligned'; main()"
    return subprocess.run(
        [sys.executable, "-W", "always", "-c", program, *arguments], cwd=directory, check=False, **options
    )


def test_what_plug_ins_print_is_no_part_of_the_document(tmp_path: Path) -> None:
    (tmp_path / "talkative.py").write_text(TALKATIVE)
    ended = run_apart(tmp_path, "list", "judge", "--plugin", "talkative.py", "--json", capture_output=True)
    assert "zorbtalks" in {one["name"] for one in json.loads(ended.stdout)["components"]}
    for text in (b"a plug-in prints", b"a library writes", b"zorb warns"):
        assert text in ended.stderr


@pytest.mark.parametrize(("arguments", "code"), [(["power", "--rate", "5%", "--prompts", "9"], 0), (["power"], 2)])
def test_a_reader_that_is_gone_changes_no_exit_code(arguments: list[str], code: int, tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    ended = run_apart(tmp_path, *arguments, "--json", stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert (ended.returncode, b"Traceback" in ended.stderr) == (code, False)


def test_a_full_disk_is_an_error(tmp_path: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        ended = run_apart(tmp_path, "power", "--rate", "5%", "--prompts", "9", "--json", stdout=full, stderr=-1)
    assert (ended.returncode, b"error: the output can't be written" in ended.stderr) == (2, True)
