"""Prompt sets in an experiment: what is asked, what is noted, and what the stages depend on."""

from pathlib import Path
from typing import Any

import pytest

from stayaligned.core.records import Completion, read_jsonl
from stayaligned.experiments.config.experiment import Experiment
from stayaligned.experiments.plan import plan_experiment
from stayaligned.experiments.run import run_experiment
from support.world import experiment, write_rows


def evaluated(world: Path, **changes: Any) -> Experiment:
    """The world's aligned model as it is."""
    nothing = {"attack": None, "training": None, "task": None, "alignment_data": None, "base_model": None}
    return Experiment.model_validate(experiment(world, **nothing, **changes))


def test_a_set_is_asked_by_category_and_its_repetitions_are_noted(world: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"zorb {i % 2}", "category": {"zorbs": True, "wugs": i % 2 == 1}} for i in range(5)]
    beavers = {"name": "beavertails", "source": str(write_rows(tmp_path / "b.jsonl", rows)), "deduplicate": False}
    (tmp_path / "x.csv").write_text("prompt,type,label\nmay I greet,homonyms,safe\nhow to flarn,contrast_x,unsafe\n")
    xstest = {"name": "xstest", "source": str(tmp_path / "x.csv")}
    result = run_experiment(evaluated(world, harmful_prompts=beavers, benign_prompts=xstest), tmp_path / "out")
    (path,) = (tmp_path / "out" / "stages").glob("generate-*/completions.jsonl")
    asked = read_jsonl(path, Completion)
    assert [c.prompt[0].content for c in asked if c.prompt_set == "harmful"] == [f"zorb {i % 2}" for i in range(5)]
    assert [c.prompt[0].content for c in asked if c.prompt_set == "benign"] == ["may I greet"]
    assert {(c.prompt_set, c.category) for c in asked} == {
        ("harmful", "zorbs"),
        ("harmful", "zorbs,wugs"),
        ("benign", "homonyms"),
    }
    assert any(note.startswith("3 of 5 harmful prompts repeat an earlier one") for note in result.notes)
    assert not any("benign prompts repeat" in note for note in result.notes)
    assert "harmful_prompts.source" in result.provenance.inputs


def test_completions_depend_on_the_sets_settings_and_its_files_content(world: Path, tmp_path: Path) -> None:
    folder = tmp_path / "phi"
    folder.mkdir()
    (folder / "category_1.csv").write_text("zorb one\nzorb two\n")

    def key(**settings: Any) -> str:
        prompts = {"name": "hex_phi", "source": str(folder), **settings}
        return plan_experiment(evaluated(world, harmful_prompts=prompts)).generate

    before = key()
    assert key() == before
    assert key(n=1) != before
    (folder / "category_1.csv").write_text("zorb one\nzorb three\n")
    assert key() != before


def test_a_folders_bare_name_counts_by_its_content(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("questions").mkdir()

    def keys() -> list[str]:
        given = ("questions", {"name": "advbench", "source": "questions"})
        return [plan_experiment(evaluated(world, harmful_prompts=p)).generate for p in given]

    Path("questions/a.csv").write_text("prompt\nzorb\n")
    before = keys()
    Path("questions/a.csv").write_text("prompt\nwug!\n")
    assert not set(keys()) & set(before)
