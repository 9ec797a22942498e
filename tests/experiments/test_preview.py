"""The length of a training and what follows from it are known before it runs."""

from pathlib import Path
from typing import Any

import pytest

from stayaligned import Experiment, StayalignedError
from stayaligned.experiments.preview import preview_training
from support.world import write_rows


def experiment(directory: Path, defense: Any, **training: Any) -> Experiment:
    rows = [{"prompt": f"q{i}", "completion": "yes"} for i in range(40)]
    write_rows(directory / "rows.jsonl", rows)
    task = {"name": "jsonl", "train": str(directory / "rows.jsonl"), "test": str(directory / "rows.jsonl")}
    return Experiment.model_validate(
        {
            "model": "m",
            "task": task,
            "alignment_data": "safety.jsonl",
            "defenses": [defense],
            "training": {"per_device_train_batch_size": 4, **training},
        }
    )


LISA = {"name": "lisa", "alignment_steps": 2, "finetuning_steps": 18}


@pytest.mark.parametrize(("training", "steps"), [({"max_steps": 40}, 40), ({"num_train_epochs": 4}, 40), ({}, 30)])
def test_few_cycles_are_noted_before_training(tmp_path: Path, training: dict[str, Any], steps: int) -> None:
    notes = preview_training(experiment(tmp_path, LISA, **training))
    assert f"a run of {steps} steps has {steps / 20:.1f} cycles of 20 steps" in notes[-1]


def test_a_training_that_never_reaches_the_users_rows_is_refused_before_it_begins(tmp_path: Path) -> None:
    with pytest.raises(StayalignedError, match="a run of 30 optimizer steps never trains on the user's rows"):
        preview_training(experiment(tmp_path, "lisa"))
    with pytest.raises(ValueError, match="defenses: a run of 20 optimizer steps never trains on the user's rows"):
        experiment(tmp_path, "bso", max_steps=20)


def test_a_training_of_unknown_length_has_no_notes(tmp_path: Path) -> None:
    assert preview_training(experiment(tmp_path, {**LISA, "budget": "cover"})) == ()
    assert preview_training(experiment(tmp_path, "sft")) == ()
