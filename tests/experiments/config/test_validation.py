"""`testbed:` references become paths, and nothing else changes."""

from pathlib import Path

import pytest

from stayaligned import testbed
from stayaligned.core.errors import StayalignedError
from stayaligned.experiments.config.experiment import Experiment
from stayaligned.experiments.config.validation import parse, resolve_references


@pytest.fixture(autouse=True)
def paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(testbed, "resolve", lambda reference, seed, **_: Path(f"/{seed}/{reference[8:]}"))


def test_references_are_resolved_at_every_depth_and_options_stay() -> None:
    experiment = Experiment.model_validate(
        {
            "model": "testbed:aligned",
            "task": {"name": "jsonl", "train": "testbed:data/topic-train.jsonl?where=id:1"},
            "judges": ["keyword", {"name": "classifier", "model": "testbed:judge"}],
            "harmful_prompts": "testbed:data/harmful-prompts.jsonl",
            "watch": {"prompts": "testbed:data/harmful.jsonl"},
            "seed": 3,
        }
    )
    resolved = resolve_references(experiment, 3)
    spec = resolved.spec()
    assert spec["model"] == "/3/aligned"
    assert spec["task"]["train"] == "/3/data/topic-train.jsonl?where=id:1"
    assert spec["judges"][1]["model"] == "/3/judge"
    assert spec["watch"]["prompts"] == "/3/data/harmful.jsonl"
    changed = {"model", "task", "judges", "harmful_prompts", "watch"}
    assert {key for key, value in experiment.spec().items() if value != spec[key]} == changed
    assert resolved.judges[0] is experiment.judges[0]
    assert Experiment.model_validate(spec) == resolved, "as if the paths had been written in the configuration"


def test_settings_without_a_reference_are_returned_as_they_are() -> None:
    experiment = Experiment.model_validate({"model": "m", "training": None, "harmful_prompts": "owner/name"})
    assert resolve_references(experiment, 0) is experiment


def test_a_setting_with_two_errors_is_reported_once() -> None:
    with pytest.raises(StayalignedError) as caught:
        parse(Experiment, {"model": "m", "task": "nosuch.jsonl", "harmful_prompts": "nosuch.csv"}, "an experiment")
    first, *lines = str(caught.value).splitlines()
    assert first == "an experiment: 2 errors"
    assert [line.split(":")[0].strip() for line in lines] == ["task", "harmful_prompts"]
