"""Tasks of the lm-evaluation-harness as a setting, its values by sample, and their means. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, field_validator

from stayaligned.core.records import Metric, Record
from stayaligned.evaluation import metrics


class LmEval(BaseModel):
    """Tasks that lm-eval runs on the final model, each a stage of its own.

    Everything about a task is lm-eval's: its prompts, few-shot examples, splits and metrics. A YAML file in
    `include_path` may name Python code (`!function`), which then runs: give a folder that you trust. Files that a task
    reads from outside of that folder are no part of the stage's key.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    operational: ClassVar[frozenset[str]] = frozenset({"batch_size"})

    tasks: tuple[str, ...] = Field(min_length=1)
    """Names of tasks, groups or tags."""
    limit: int | None = Field(default=None, ge=1)
    """The first so many samples of each task; null takes all."""
    num_fewshot: int | None = Field(default=None, ge=0)
    """Examples before each question; null takes the task's own number. As in lm-eval, a task that sets 0 keeps 0."""
    include_path: str | None = None
    """A folder with YAML tasks of your own, which come before lm-eval's."""
    apply_chat_template: bool = False
    """Ask through the model's chat template; false is lm-eval's default, with which published numbers are made."""
    batch_size: int = Field(default=8, ge=1)

    @field_validator("tasks")
    @classmethod
    def _are_distinct(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        twice = sorted({name for name in value if value.count(name) > 1})
        if twice:
            raise ValueError(f"named twice: {', '.join(twice)}")
        return value

    def identity(self, task: str) -> dict[str, Any]:
        """What one task's values depend on, the model aside."""
        kept = {key: value for key, value in self.model_dump(mode="json").items() if key not in self.operational}
        return {**kept, "tasks": [task]}


class HarnessValue(Record):
    """One metric of one sample, as lm-eval gave it."""

    task: str
    doc_id: int
    """The sample's place in the task's split."""
    metric: str
    """With the filter of the answer behind a comma where there is one: `exact_match,flexible-extract`."""
    value: float | None
    """0 to 1; None where it is no number (NaN)."""
    higher_is_better: bool


def harness_metrics(values: Iterable[HarnessValue]) -> list[Metric]:
    """The mean of each metric with our interval, named `lm_eval/TASK/METRIC`, in order of appearance."""
    found: dict[str, list[HarnessValue]] = {}
    for value in values:
        found.setdefault(f"lm_eval/{value.task}/{value.metric}", []).append(value)
    return [
        metrics.mean_score([row.value for row in rows], name, higher_is_better=rows[0].higher_is_better)
        for name, rows in found.items()
    ]
