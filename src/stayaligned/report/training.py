"""Curves from the training logs, one entry per training even if several arms patch its adapter."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from stayaligned.evaluation.results import Result
from stayaligned.report.values import Points, Training

BY_PHASE = ("alignment_loss", "finetuning_loss")
"""The losses of the two phases, between which `loss` alternates for alternating defenses."""
SEPARATE = ("drift", "watch/refusal_margin")
"""Quantities other than losses, which are drawn on separate axes."""
QUANTITIES = ("loss", *BY_PHASE, "watch/alignment_loss", *SEPARATE)
"""Keys of a log row that a report draws if present."""


def collect_trainings(groups: Mapping[str, Sequence[Result]]) -> tuple[Training, ...]:
    """Return the trainings of the arms. Arms with the same training stage in some seed share one."""
    owner: dict[str, str] = {}
    arms: dict[str, list[str]] = {}
    runs_of: dict[str, dict[int, Result]] = {}
    for arm, runs in groups.items():
        logged = [run for run in runs if run.training_log]
        if not logged:
            continue
        keys = [run.provenance.stages.get("train") or f"{arm}/{run.seed}" for run in logged]
        first = next((owner[key] for key in keys if key in owner), arm)
        owner.update(dict.fromkeys(keys, first))
        arms.setdefault(first, []).append(arm)
        for run in logged:
            runs_of.setdefault(first, {}).setdefault(run.seed, run)
    trainings = [Training(tuple(arms[first]), _curves(runs_of[first])) for first in arms]
    return tuple(training for training in trainings if training.curves)


def _curves(runs: Mapping[int, Result]) -> dict[str, dict[int, Points]]:
    curves = {
        quantity: {seed: points for seed, run in runs.items() if (points := _points(run, quantity))}
        for quantity in QUANTITIES
    }
    return {quantity: by_seed for quantity, by_seed in curves.items() if by_seed}


def _points(run: Result, quantity: str) -> Points:
    rows = [(row.get("step"), row.get(quantity)) for row in run.training_log]
    return tuple(
        (float(step), float(value))
        for step, value in rows
        if isinstance(step, int | float) and isinstance(value, int | float) and math.isfinite(value)
    )
