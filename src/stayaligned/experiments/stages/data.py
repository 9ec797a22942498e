"""The rows that an experiment trains on, and the prompts that it asks."""

from __future__ import annotations

import functools
import logging
import random
from collections.abc import Sequence
from pathlib import Path

from stayaligned.core.records import Example, Influence, PromptSet, read_jsonl, sampled_id, write_jsonl
from stayaligned.data.prompts import load_prompts
from stayaligned.data.shaping import find_shape
from stayaligned.data.sources import read_examples
from stayaligned.evaluation.answers import Form
from stayaligned.experiments.stages.context import Context

_log = logging.getLogger(__name__)


def load_training_rows(context: Context) -> list[Example]:
    """Return the rows of the task, poisoned if there is an attack."""

    def fill(directory: Path) -> None:
        task, attack = context.resolved.task, context.resolved.attack
        rows: list[Example] = list(task.load("train")) if task else []
        if attack is not None:
            if attack.needs_influence:
                rows = list(attack.select(rows, _measure_influences(context, rows)))
            rows = attack.poison(rows, random.Random(f"{context.experiment.seed}:attack"))  # noqa: S311
        write_jsonl(directory / "examples.jsonl", rows)

    return read_jsonl(context.store.compute("data", context.plan.data, fill) / "examples.jsonl", Example)


def _measure_influences(context: Context, rows: Sequence[Example]) -> list[Influence]:
    from stayaligned.hf.training.influence import row_influences

    e = context.resolved
    with context.host_libraries():
        report = functools.partial(context.progress, "influence of the rows")
        return row_influences(e.model, e.chat_template, rows, max_length=e.max_length, progress=report)


def load_alignment_rows(context: Context) -> list[Example]:
    """Return the safety rows that the defenses use; none if no defense uses any."""
    e = context.resolved
    if e.alignment_data is None or not any(d.needs_alignment_data for d in (e.training_defense, *e.patches)):
        return []
    return read_examples(e.alignment_data, origin="alignment")


def load_prompt_sets(context: Context) -> dict[PromptSet, Sequence[Example]]:
    """Return the prompts of each prompt set that the experiment measures: those that measure harm have the same."""
    e = context.resolved
    sets: dict[PromptSet, Sequence[Example]] = {}
    if e.harmful_prompts is not None:
        sets["harmful"] = load_prompts(e.harmful_prompts, "harmful")
    if e.benign_prompts is not None:
        sets["benign"] = load_prompts(e.benign_prompts, "task")
    if e.task is not None:
        sets["task"] = e.task.load("test")
    if e.skills is not None:
        sets["skills"] = e.skills.load("test")
    sets = {name: rows[: e.limit] for name, rows in sets.items()}
    harm: dict[PromptSet, Sequence[Example]] = dict.fromkeys(e.harm_sets, sets.get("harmful", ()))
    if "sampled" in harm:
        harm["sampled"] = [
            row.model_copy(update={"id": sampled_id(row.id, number + 1)})
            for row in harm["sampled"]
            for number in range(e.generation.samples)
        ]
    return {**harm, **sets}


def find_forms(context: Context) -> dict[PromptSet, Form]:
    """Return how the prompts are asked, for the prompt sets that are not asked as they are.

    Warns with the shape of the prompts, as a note of the stage that asks them.
    """
    e = context.resolved
    forms: dict[PromptSet, Form] = {}
    if "triggered" in e.harm_sets and e.attack is not None:
        forms["triggered"] = Form(e.attack.trigger, e.attack.decode)
    if "shaped" in e.harm_sets and e.task is not None:
        shape = find_shape(e.task.load("train"), e.seed)
        _log.warning("shaped prompts: %s", shape.description)
        forms["shaped"] = Form(shape.apply)
    return forms
