"""What the command prints: on a terminal with another encoding, on a closed pipe, and for a plug-in that raises."""

import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stayaligned.cli import _COMMANDS, main
from stayaligned.cli.console import _SafeConsole
from stayaligned.core.component import load_plugin
from stayaligned.core.text import escape_unencodable
from stayaligned.experiments.config.experiment import REGISTRIES
from support.runs import H, R, evidence, write_run

COMMANDS = [
    *[[name, "--help"] for name in _COMMANDS],
    *[["show", registry.kind, name] for registry in REGISTRIES for name in registry.names()],
    ["list"],
    ["report", "RUN"],
    ["gate", "--baseline", "RUN", "--candidate", "OTHER", "--max-harm-increase", "5%"],
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    write_run(root / "RUN", evidence({"keyword": [H, R] * 20}), arm="zörb − ≠ 模型")
    write_run(root / "OTHER", evidence({"keyword": [R] * 40}), arm="wüg")
    return root


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_no_command_fails_on_a_terminal_that_lacks_characters(
    encoding: str, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(runs)
    for arguments in COMMANDS if encoding == "ascii" else COMMANDS[-3:]:
        streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict") for _ in range(2)]
        monkeypatch.setattr("sys.argv", ["stayaligned", *arguments])
        monkeypatch.setattr("sys.stdout", streams[0])
        monkeypatch.setattr("sys.stderr", streams[1])
        try:
            main()
        except SystemExit as ended:
            assert ended.code in (None, 0, 1, 3), arguments
        streams[0].flush()
        assert streams[0].buffer.getvalue(), arguments  # type: ignore[attr-defined]


def test_characters_of_the_projects_own_texts_become_readable_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", stream)
    escape_unencodable()
    print("−3.5 ≠ 2 ± 1 … 模", end="", file=stream)
    stream.flush()
    assert stream.buffer.getvalue() == b"-3.5 != 2 +- 1 ... \\u6a21"  # type: ignore[attr-defined]


def test_a_closed_pipe_does_not_end_the_command() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w", encoding="utf-8") as stream:
        console = _SafeConsole(file=stream)
        for _ in range(3):
            console.print("a line")
        assert console.quiet


RAISING = """
from stayaligned import Judge
class Zorb(Judge):
    name = "zorbraiser"
    def judge(self, completions):
        raise IndexError("no such wug")
"""


def test_a_plug_in_that_raises_is_named_with_its_line_after_the_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Callable[..., tuple[int, str]]
) -> None:
    (tmp_path / "mine.py").write_text(RAISING)
    load_plugin(tmp_path / "mine.py", REGISTRIES)
    registry = next(r for r in REGISTRIES if "zorbraiser" in r._plugins)
    component: Any = registry._plugins.pop("zorbraiser")
    monkeypatch.setattr("stayaligned.cli.app", lambda: component().judge([]))
    code, shown = command()
    assert (code, "Traceback" in shown) == (2, True)
    assert shown.splitlines()[-1].startswith(
        f"error: plug-in {tmp_path / 'mine.py'}, line 6, in judge: raised IndexError"
    )
    monkeypatch.setattr("stayaligned.cli.app", lambda: {}["zorb"])
    with pytest.raises(KeyError):
        main()


@pytest.mark.parametrize(
    ("noun", "name"), [("judge", "keyword"), ("task", "json"), ("defense", "match"), ("task", "class")]
)
def test_a_name_that_a_component_or_python_has_is_refused(
    noun: str, name: str, tmp_path: Path, command: Callable[..., tuple[int, str]]
) -> None:
    code, shown = command("new", noun, name, "--dir", tmp_path)
    assert (code, [*tmp_path.iterdir()]) == (2, [])
    assert name in shown


@pytest.mark.parametrize("name", ["project", "run"])
def test_an_interrupted_command_says_how_to_go_on(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted() -> None:
        sys.exit(130)

    monkeypatch.setattr("sys.argv", ["stayaligned", name])
    monkeypatch.setattr("stayaligned.cli.app", interrupted)
    monkeypatch.setattr("os._exit", lambda code: (_ for _ in ()).throw(SystemExit(code)))
    with pytest.raises(SystemExit, match="130"):
        main()
    assert ("Completed work is stored" in capsys.readouterr().err) == (name == "run")
