"""What is known about an experiment's training before it runs: its length, and what that means for the defense."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from stayaligned import testbed
from stayaligned.experiments.config.experiment import Experiment
from stayaligned.experiments.config.validation import strings_in
from stayaligned.experiments.stages.keys import input_path

_HOST_EPOCHS, _HOST_BATCH = 3, 8
"""Defaults of transformers' TrainingArguments."""


def preview_training(experiment: Experiment) -> Sequence[str]:
    """Return the notes on the length of the training that a result would have; none if the length is unknown.

    Raises:
        StayalignedError: if the defense refuses a training of this length, or the rows can't be read.
    """
    steps = planned_steps(experiment)
    if steps is None:
        return ()
    experiment.training_defense.check_steps(steps)
    return experiment.training_defense.notes(steps)


def planned_steps(experiment: Experiment) -> int | None:
    """Return `max_steps`, or the steps of the epochs in one process; None if the rows are not in a local file."""
    if not experiment.trains or experiment.task is None:
        return None
    training = experiment.training or {}
    if training.get("max_steps", -1) > 0:
        return training["max_steps"]
    named = [value for _, value in strings_in(experiment.task.spec())]
    if (
        any(testbed.is_reference(value) for value in named)
        or experiment.training_defense.spec().get("budget") == "cover"
    ):
        return None
    if not any((path := input_path("", value)) is not None and path.is_file() for value in named):
        return None
    rows = list(experiment.task.load("train"))
    if experiment.attack is not None:
        rows = experiment.attack.poison(rows, random.Random(0))  # noqa: S311
    batches = math.ceil(len(rows) / training.get("per_device_train_batch_size", _HOST_BATCH))
    steps = math.ceil(batches / training.get("gradient_accumulation_steps", 1))
    plain = math.ceil(training.get("num_train_epochs", _HOST_EPOCHS) * steps)
    return experiment.training_defense.run_steps(plain)
