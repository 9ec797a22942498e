"""What the command prints: on a terminal with another encoding, on a closed pipe, and for a plug-in that raises."""

import io
import os
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stayaligned.cli import _COMMANDS, main, project
from stayaligned.cli.console import _SafeConsole, out, plain_table
from stayaligned.core.component import load_plugin
from stayaligned.core.records import LayerReport
from stayaligned.core.text import escape_unencodable
from stayaligned.experiments.config.experiment import REGISTRIES
from stayaligned.report.scan import threshold_outcomes
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


_WORD = st.text(st.sampled_from("abz09.−±%模"), min_size=1, max_size=30)
_CELL = st.lists(_WORD, max_size=5).map(" ".join)


@given(
    st.integers(1, 6).flatmap(lambda n: st.lists(st.lists(_CELL, min_size=n, max_size=n), min_size=2, max_size=5)),
    st.integers(20, 120),
    st.booleans(),
)
def test_a_table_of_any_width_loses_and_breaks_no_word(rows: list[list[str]], width: int, numbers: bool) -> None:
    titles, *cells = rows
    table = plain_table(*titles, numbers=numbers)
    for row in cells:
        table.add_row(*row)
    stream = io.StringIO()
    _SafeConsole(file=stream, width=width, markup=False, highlight=False).print(table)
    assert Counter(word for row in cells for cell in row for word in cell.split()) <= Counter(stream.getvalue().split())


@pytest.mark.parametrize("width", [80, 60, 30])
def test_no_command_cuts_a_word_or_number_of_a_table(
    width: int, runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(runs)
    layers = [
        LayerReport(
            module=f"model.language_model.layers.{n}.self_attn.q_proj",
            similarity=0.1 * n,
            shrinkage=0.98765,
            selected=n > 2,
            undecided=n == 3,
            update_norm=1.0,
            truncation_error=1e-3,
            skipped="zero_update" if n == 1 else None,
        )
        for n in range(5)
    ]

    def show_all() -> list[str]:
        for arguments in (
            ["list"],
            ["report", "RUN", "OTHER", "--out", "."],
            ["gate", "--baseline", "RUN", "--candidate", "OTHER", "--max-harm-increase", "5%", "--max-harm", "9%"],
            ["power", "--rate", "5%", "--difference", "2%", "--prompts", "4000"],
            ["power", "--rate", "5%", "--margin", "2%", "--prompts", "4000"],
        ):
            monkeypatch.setattr("sys.argv", ["stayaligned", *arguments])
            with suppress(SystemExit):
                main()
        project._print_layers(layers, "would change")
        project._print_adapters([Path("a-long-name-of-an-adapter"), Path("b")], [layers, layers])
        project._print_outcomes(threshold_outcomes(layers))
        return capsys.readouterr().out.split()

    monkeypatch.setattr(out, "_width", 400)
    wide = show_all()
    monkeypatch.setattr(out, "_width", width)
    narrow = show_all()
    assert "…" not in " ".join(narrow)
    assert [word for word in wide if word not in narrow and word.strip("─")] == []


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
    monkeypatch.setattr("stayaligned.cli.app", lambda *_, **__: component().judge([]))
    code, shown = command()
    assert (code, "Traceback" in shown) == (2, True)
    assert shown.splitlines()[-1].startswith(
        f"error: plug-in {tmp_path / 'mine.py'}, line 6, in judge: raised IndexError"
    )
    monkeypatch.setattr("stayaligned.cli.app", lambda *_, **__: {}["zorb"])
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
    def interrupted(*_: object, **__: object) -> None:
        sys.exit(130)

    monkeypatch.setattr("sys.argv", ["stayaligned", name])
    monkeypatch.setattr("stayaligned.cli.app", interrupted)
    monkeypatch.setattr("os._exit", lambda code: (_ for _ in ()).throw(SystemExit(code)))
    with pytest.raises(SystemExit, match="130"):
        main()
    assert ("Completed work is stored" in capsys.readouterr().err) == (name == "run")


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["evaluate", "-h"]])
def test_help_that_nobody_reads_to_its_end_is_no_failure(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    monkeypatch.setattr("sys.argv", ["stayaligned", *arguments])
    monkeypatch.setattr("sys.stdout", os.fdopen(writing, "w", encoding="utf-8"))
    monkeypatch.setattr("sys.stderr", sys.stderr)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0


def test_the_help_of_evaluate_speaks_of_no_training(command: Callable[..., tuple[int, str]]) -> None:
    code, shown = command("evaluate", "-h")
    assert (code, "Usage: stayaligned evaluate" in shown) == (0, True)
    assert "train" not in shown
