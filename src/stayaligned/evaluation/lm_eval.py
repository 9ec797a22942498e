"""Values that lm-eval gives per sample to metrics with intervals. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable

from stayaligned.core.records import HarnessValue, Metric
from stayaligned.evaluation import metrics


def lm_eval_metrics(values: Iterable[HarnessValue]) -> list[Metric]:
    """Return the mean of each metric with its interval, named `lm_eval/TASK/METRIC`, in order of appearance."""
    found: dict[str, list[HarnessValue]] = {}
    for value in values:
        found.setdefault(f"lm_eval/{value.task}/{value.metric}", []).append(value)
    return [
        metrics.mean_score([row.value for row in rows], name, higher_is_better=rows[0].higher_is_better)
        for name, rows in found.items()
    ]
