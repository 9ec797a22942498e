"""The rows that an experiment trains on, and the prompts that it asks."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from stayaligned.core.records import Example, PromptSet, read_jsonl, write_jsonl
from stayaligned.data.prompts import load_prompts
from stayaligned.data.sources import read_examples
from stayaligned.experiments.stages.context import Context


def load_training_rows(context: Context) -> list[Example]:
    """Return the rows of the task, poisoned if there is an attack."""

    def fill(directory: Path) -> None:
        task, attack = context.resolved.task, context.resolved.attack
        rows: list[Example] = list(task.load("train")) if task else []
        if attack is not None:
            rows = attack.poison(rows, random.Random(f"{context.experiment.seed}:attack"))  # noqa: S311
        write_jsonl(directory / "examples.jsonl", rows)

    return read_jsonl(context.store.compute("data", context.plan.data, fill) / "examples.jsonl", Example)


def load_alignment_rows(context: Context) -> list[Example]:
    """Return the safety rows that the defenses use; none if no defense uses any."""
    e = context.resolved
    if e.alignment_data is None or not any(d.needs_alignment_data for d in (e.training_defense, *e.patches)):
        return []
    return read_examples(e.alignment_data, origin="alignment")


def load_prompt_sets(context: Context) -> dict[PromptSet, Sequence[Example]]:
    """Return the prompts of each prompt set that the experiment names."""
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
    return {name: rows[: e.limit] for name, rows in sets.items()}
