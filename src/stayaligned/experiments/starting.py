"""A configuration to start from, and a file of safety data to fill in: the work of `stayaligned init`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stayaligned import testbed
from stayaligned.core.errors import StayalignedError, did_you_mean
from stayaligned.core.files import refuse_existing, write_text
from stayaligned.core.records import Example, Origin
from stayaligned.data.options import parse_source
from stayaligned.data.sources import PLACEHOLDER, read_examples
from stayaligned.data.tasks import TASKS
from stayaligned.defenses import DEFENSES, PatchDefense
from stayaligned.evaluation.judges import JUDGES
from stayaligned.experiments.config.experiment import Experiment
from stayaligned.experiments.config.validation import parse
from stayaligned.experiments.config.yaml_file import dump_yaml
from stayaligned.experiments.preview import preview_training
from stayaligned.experiments.stages.keys import split_options
from stayaligned.weights.directories import refuse_unless_model

CONFIG_FILE, SAFETY_FILE = "experiment.yaml", "safety.jsonl"
NEW = "new"
"""The answer that asks for a file of placeholder rows."""
CHOICES = {
    "lisa": {"name": "lisa", "rho": 1.0},
    "mixing": {"name": "mixing"},
    "safe_lora": {"name": "safe_lora", "threshold": 0.35},
    "complement": {"name": "complement", "rank": 8, "all_layers": True},
    "sft": {"name": "sft"},
}
"""The defenses to choose from, with settings to start from."""
_BATCH, _EPOCHS, _CYCLE = 8, 3, 100
_LONGEST_LABEL = 5
"""Words up to which a completion counts as a label."""
_ROWS = (
    ("A request that your model must refuse.", "The refusal, in the tone of your model."),
    ("Another such request, of another kind of harm; collect at least some hundreds.", "Its refusal."),
    ("A request that sounds alike and is harmless.", "The helpful answer, so that the model keeps answering."),
)


@dataclass(frozen=True)
class Answers:
    """What a person answers to the questions of `stayaligned init`."""

    model: str
    """The aligned model: a directory or a hub id."""
    data: str
    """What to fine-tune on: a source of rows, or the name of a task."""
    safety: str
    """A source of requests with safe completions, or `new`."""
    defense: str
    """One of `CHOICES`."""
    judge: str
    """Name of the judge."""
    base_model: str | None = None
    """The unaligned ancestor of the model, for a defense that needs it."""


def check_model(value: str) -> None:
    """Check that a model is a checkpoint directory, or has the form of a hub id.

    Raises:
        StayalignedError: if it is neither.
    """
    if testbed.is_reference(value):
        testbed.reference_key(value, 0)
    elif (path := Path(value).expanduser()).exists():
        refuse_unless_model(path)
    elif not value or value.startswith((".", "/", "~")) or value.count("/") != 1:
        raise StayalignedError(
            f"{value or '(nothing)'}: no such directory, and no hub id",
            hint="Give a checkpoint directory, or a hub id such as owner/name.",
        )


def check_data(value: str) -> Sequence[Example] | None:
    """Read the rows to fine-tune on; None for a task by its name and for rows that are not on this machine yet.

    Raises:
        StayalignedError: if the rows can't be read.
    """
    return None if value in TASKS.names() else _read(value, learned="task")


def check_safety(value: str) -> Sequence[Example] | None:
    """Read the safety data; None for `new` and for rows that are not on this machine yet.

    Raises:
        StayalignedError: if the rows can't be read.
    """
    return None if value == NEW else _read(value, learned="alignment")


def check_defense(value: str) -> None:
    """Check that a defense is one of `CHOICES`.

    Raises:
        StayalignedError: if it is not.
    """
    _check_name(value, [*CHOICES], "defense")


def check_judge(value: str) -> None:
    """Check that a judge is one that needs no settings.

    Raises:
        StayalignedError: if it is not.
    """
    _check_name(value, judge_names(), "judge")


def judge_names() -> list[str]:
    """Return the judges that need no settings."""
    return [
        name
        for name in JUDGES.names()
        if not any(field.is_required() for field in JUDGES.get(name).model_fields.values())
    ]


def needs_base(defense: str) -> bool:
    """Return whether a defense compares the model with its unaligned ancestor."""
    chosen = DEFENSES.parse(CHOICES[defense])
    return isinstance(chosen, PatchDefense) and chosen.needs_base


def write_start(answers: Answers, directory: Path) -> tuple[list[Path], list[str]]:
    """Write the configuration, and the safety data if it is to be new, completely or not at all.

    Returns:
        The written files, and notes on the training.

    Raises:
        StayalignedError: if a file exists, or the answers don't fit together.
    """
    texts: dict[Path, str] = {}
    if answers.safety == NEW:
        rows = [{"prompt": f"{PLACEHOLDER} {ask}", "completion": f"{PLACEHOLDER} {say}"} for ask, say in _ROWS]
        texts[directory / SAFETY_FILE] = "".join(json.dumps(row) + "\n" for row in rows)
    content = configure(answers, directory)
    config = directory / CONFIG_FILE
    texts[config] = _explain(answers, directory) + dump_yaml(content)
    for path in texts:
        refuse_existing(path)
    experiment = parse(Experiment, content, "init", check_inputs=False)
    notes = list(preview_training(experiment))
    written: list[Path] = []
    try:
        for path, text in texts.items():
            written.append(path)
            write_text(path, text)
    except BaseException:  # Ctrl-C too
        for path in written:
            path.unlink(missing_ok=True)
        raise
    return written, notes


def configure(answers: Answers, directory: Path) -> dict[str, Any]:
    """Return the settings of an experiment that fit the answers."""
    rows = check_data(answers.data)
    content: dict[str, Any] = {"model": answers.model}
    if answers.base_model:
        content["base_model"] = answers.base_model
    content["task"] = task = answers.data if answers.data in TASKS.names() else _task(answers.data, rows)
    content["alignment_data"] = str(directory / SAFETY_FILE) if answers.safety == NEW else answers.safety
    defense = {**CHOICES[answers.defense]}
    length: dict[str, Any] = {"num_train_epochs": _EPOCHS}
    if answers.defense == "lisa":
        # Phases of a tenth and nine tenths of a cycle; at least three cycles, and the last one complete.
        steps = None if rows is None else -(-len(TASKS.parse(task).load("train")) // _BATCH) * _EPOCHS
        cycle = _CYCLE if steps is None else max(2, min(_CYCLE, steps // 3))
        defense["alignment_steps"] = max(1, cycle // 10)
        defense["finetuning_steps"] = cycle - defense["alignment_steps"]
        if steps is not None:
            length = {"max_steps": max(3, steps // cycle) * cycle}
    return {
        **content,
        "defenses": [defense],
        "lora": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
        "training": {
            **length,
            "per_device_train_batch_size": _BATCH,
            "learning_rate": 1e-4,
            "logging_steps": 10,
            "save_steps": 200,
        },
        "max_length": 1024,
        "harmful_prompts": "beavertails",
        "benign_prompts": "xstest",
        "limit": 200,
        "judges": [answers.judge],
        "generation": {"max_new_tokens": 256},
    }


def _task(source: str, rows: Sequence[Example] | None) -> dict[str, Any]:
    """Score labels by equality; longer texts have no score of their own."""
    lengths = sorted(len(row.completion.split()) for row in rows or ())
    labels = bool(lengths) and lengths[len(lengths) // 2] <= _LONGEST_LABEL
    return {"name": "jsonl", "train": source, "metric": "exact" if labels else "none"}


def _explain(answers: Answers, directory: Path) -> str:
    config = directory / CONFIG_FILE
    lines = [
        f"stayaligned doctor {config}",
        f"stayaligned run {config} --out {directory / 'out'}",
        "All settings: docs/howto/your-own-model.md. Paths are relative to the directory in which the command runs.",
        "task.metric none: free text has no score of its own; exact or contains compares with the completion.",
        "harmful_prompts and benign_prompts are downloaded from the hub; or name files of your own prompts.",
    ]
    if answers.safety == NEW:
        lines.append(
            f"{directory / SAFETY_FILE}: replace its {len(_ROWS)} rows by requests to refuse, each with a refusal, and "
            "some harmless ones with an answer; a run refuses the placeholders."
        )
    return "".join(f"# {line}\n" for line in lines)


def _check_name(value: str, known: Sequence[str], what: str) -> None:
    if value not in known:
        raise StayalignedError(f"no {what} {value!r} to start from", hint=did_you_mean(value, known, f"{what}s"))


def _read(source: str, *, learned: Origin) -> Sequence[Example] | None:
    if testbed.is_reference(source):
        testbed.reference_key(split_options(source)[0], 0)
        return None
    if parse_source(source).hub:
        return None
    return read_examples(source, origin=learned)
