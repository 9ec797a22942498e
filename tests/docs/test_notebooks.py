"""The notebooks run, and their stored outputs are those of a run, without anything of the machine that ran them."""

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[2] / "examples" / "notebooks").glob("*.ipynb"))
MACHINE = re.compile(r"/(root|tmp|home|work|Users)\b|\.cache|\d+ ?(it|examples)/s|Traceback|Warning")


def cells(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["cells"]


def test_there_are_three_notebooks() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["gate-release", "keep-aligned", "repair-adapter"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_outputs_are_complete_and_hold_nothing_of_the_machine(path: Path) -> None:
    code = [cell for cell in cells(path) if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == [*range(1, len(code) + 1)]
    assert any(cell["outputs"] for cell in code)
    for cell in code:
        assert {output["name"] for output in cell["outputs"]} <= {"stdout"}
        assert not MACHINE.search("".join("".join(output["text"]) for output in cell["outputs"]))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_asserts_what_its_prose_says(path: Path) -> None:
    source = "\n".join("".join(cell["source"]) for cell in cells(path) if cell["cell_type"] == "code")
    assert sum(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(source))) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(path.parent)
    import refresh

    refresh.run(path)
