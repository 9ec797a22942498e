"""A plug-in that imports from a place of an earlier version is one error that names the new place."""

import importlib.metadata
import importlib.util
import sys
from pathlib import Path

import pytest

from stayaligned.core.component import Registry, load_plugin
from stayaligned.core.errors import StayalignedError
from stayaligned.core.moved import _MOVED, moved_imports
from stayaligned.evaluation.judges import JUDGES, Judge

OLD_JUDGE = """
from typing import ClassVar
from stayaligned.judges import Judge
from stayaligned.records import Completion, Verdict, write_jsonl

class Old(Judge):
    name: ClassVar[str] = "old"

    def judge(self, completions):
        from stayaligned.projection import compare
        return []
"""
LINES = (
    "line 3: write `from stayaligned import Judge`",
    "line 4: write `from stayaligned import Completion`",
    "line 4: write `from stayaligned import Verdict`",
    "line 4: write `from stayaligned.core.records import write_jsonl`",
    "line 10: write `from stayaligned.algorithms.safe_lora import compare`",
)


@pytest.mark.parametrize("new", sorted(set(_MOVED.values())))
def test_every_new_place_is_a_module(new: str) -> None:
    assert importlib.util.find_spec(f"stayaligned.{new}") is not None


@pytest.mark.parametrize(
    ("line", "replacement"),
    [
        ("import stayaligned.judges.keyword as k", "`import stayaligned.evaluation.judges.keyword`"),
        ("from stayaligned import judges", "`import stayaligned.evaluation.judges`"),
        (
            "from stayaligned.judges.keyword import Keyword",
            "`from stayaligned.evaluation.judges.keyword import Keyword`",
        ),
        ("from stayaligned.defenses._layerwise import Like", "`from stayaligned.defenses._projection import Like`"),
        (
            "from stayaligned.metrics.prompts import mean_of_prompts",
            "`from stayaligned.evaluation.metrics.paired import mean_of_prompts`",
        ),
        ("from stayaligned.harness import LmEval", "`from stayaligned.core.settings import LmEval`"),
        ("from stayaligned.store import identify", "`from stayaligned.experiments.stages.keys import identify`"),
        ("from stayaligned.results import versions", "`from stayaligned.core.provenance import versions`"),
        ("from stayaligned.metrics import rate", "`from stayaligned.evaluation.metrics import rate`"),
        ("from stayaligned.data import read_rows", "`from stayaligned.data.sources import read_rows`"),
        ("from stayaligned.data import read_examples", "`from stayaligned import read_examples`"),
        ("from stayaligned.data import sample", "`from stayaligned.data.sampling import sample`"),
    ],
)
def test_an_old_import_gives_the_new_one(line: str, replacement: str) -> None:
    assert moved_imports(line) == [f"line 1: write {replacement}"]


def test_a_name_that_is_gone_is_reported_as_gone() -> None:
    assert moved_imports("from stayaligned.pipeline import Run") == ["line 1: Run is gone, see CHANGELOG.md"]


@pytest.mark.parametrize(
    "line",
    [
        "import torch",
        "from . import judges",
        "from stayaligned import Judge",
        "from stayaligned.data import tasks",
        "from stayaligned.data.tasks import Task",
        "from stayaligned.data.nowhere import x",
        "from stayaligned.nowhere import x",
        "x = ",
    ],
)
def test_other_imports_are_left_to_python(line: str) -> None:
    assert moved_imports(line) == []


def test_a_plugin_file_with_old_imports_is_one_error_with_every_new_import(tmp_path: Path) -> None:
    path = tmp_path / "old.py"
    path.write_text(OLD_JUDGE)
    with pytest.raises(StayalignedError) as caught:
        load_plugin(path, [JUDGES])
    assert f"plug-in {path} imports from places of an earlier version" in caught.value.message
    assert all(line in caught.value.message for line in LINES)


class Point(importlib.metadata.EntryPoint):
    """An entry point of the distribution `some-judges`."""

    class dist:
        name = "some-judges"


@pytest.mark.parametrize(
    ("content", "messages"),
    [
        (OLD_JUDGE, LINES),
        ("import nowhere_to_be_found", ("failed to import: ModuleNotFoundError",)),
        ("judge = 1", ("which is not a module",)),
    ],
)
def test_an_entry_point_that_fails_names_its_distribution(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, messages: tuple[str, ...]
) -> None:
    (tmp_path / "entry_point_plugin.py").write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "entry_point_plugin", raising=False)
    value = "entry_point_plugin:judge" if content.startswith("judge") else "entry_point_plugin"
    point = Point("old", value, "stayaligned")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: [point])
    registry: Registry[Judge] = Registry("judge", "stayaligned.evaluation.judges", Judge)
    with pytest.raises(StayalignedError) as caught:
        registry.names()
    for text in ("installed package some-judges", *messages):
        assert text in caught.value.message
