"""Measure some steps and completions of an experiment on this machine, and extrapolate to the whole run."""

from __future__ import annotations

import contextlib
import itertools
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stayaligned.core.progress import Progress
from stayaligned.core.records import Example, PromptSet
from stayaligned.defenses import TrainingDefense
from stayaligned.experiments.config.experiment import Experiment
from stayaligned.experiments.stages.context import Context
from stayaligned.experiments.stages.data import load_prompt_sets
from stayaligned.experiments.stages.store import Store

_STEPS, _LONGEST = 10, 60.0
"""Steps to measure after the first one, and seconds after which measuring stops."""
_FEW, _MORE = 4, 24
"""Prompts of the two measured batches: their difference is what a further prompt costs."""
_FASTER, _SLOWER = 0.7, 1.6
"""How far the mean of a whole run may lie from that of the measured steps, whatever their own noise."""


@dataclass(frozen=True)
class TimeEstimate:
    """Seconds that a part of a run will take on this machine."""

    part: str
    """`training` or `generation`."""
    seconds: float
    low: float
    high: float
    measured: str
    """What was measured, in words."""


class _EnoughError(Exception):
    """Ends a training whose steps have been measured."""


def estimate_training(experiment: Experiment, steps: int, progress: Progress) -> TimeEstimate:
    """Train a few steps as the run will, in a temporary directory, and extrapolate to `steps`.

    Of a defense with phases, the steps are a short cycle with phases of the same shares.

    Raises:
        StayalignedError: if the run's training would raise it.
    """
    from stayaligned.experiments.stages.train import train_into

    ends: list[float] = []

    def count(work: str, share: float, detail: str = "") -> None:
        progress(f"measure: {work}", min(1.0, len(ends) / _STEPS), detail)
        if detail.startswith("step "):
            ends.append(time.monotonic())
            if len(ends) > _STEPS or (len(ends) > 2 and ends[-1] - ends[0] > _LONGEST):
                raise _EnoughError

    short = experiment.model_copy(update={"defenses": tuple(map(_short_cycle, experiment.defenses)), "watch": None})
    began = time.monotonic()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:
        context = Context(short, Store(Path(place)), count)
        target = Path(place) / "product"
        target.mkdir()
        with contextlib.suppress(_EnoughError):
            train_into(context, target)
    times = [after - before for before, after in itertools.pairwise(ends)] or [time.monotonic() - began]
    mean = statistics.fmean(times)
    error = 2 * statistics.stdev(times) / len(times) ** 0.5 if len(times) > 1 else mean
    start = (ends[0] if ends else began) - began
    total = start + steps * mean
    return TimeEstimate(
        "training",
        total,
        start + steps * min(_FASTER * mean, max(mean - error, min(times))),
        start + steps * max(_SLOWER * mean, mean + error),
        f"{steps} steps, {len(times)} measured: {mean:.3g} s each, after {start:.0f} s to start",
    )


def _short_cycle(defense: Any) -> Any:
    first, second = getattr(defense, "alignment_steps", 0), getattr(defense, "finetuning_steps", 0)
    if not isinstance(defense, TrainingDefense) or not first or not second:
        return defense
    aligned = min(_STEPS - 1, max(1, round(_STEPS * first / (first + second))))
    return defense.model_copy(update={"alignment_steps": aligned, "finetuning_steps": _STEPS - aligned})


def estimate_generation(experiment: Experiment, progress: Progress) -> TimeEstimate | None:
    """Generate completions of a few prompts with the aligned model, and extrapolate to all prompts; None without any.

    Raises:
        StayalignedError: if the prompts or the model can't be read.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:
        context = Context(experiment, Store(Path(place)), progress)
        sets = load_prompt_sets(context)
        rows = sum(map(len, sets.values()))
        if not rows:
            return None
        with context.host_libraries():
            return _measure_completions(context, sets, rows)


def _measure_completions(context: Context, sets: dict[PromptSet, Sequence[Example]], rows: int) -> TimeEstimate:
    from stayaligned.hf import models
    from stayaligned.hf.generation.generate import complete_each

    e = context.resolved
    began = time.monotonic()
    tokenizer = models.load_tokenizer(e.model, e.chat_template)
    model = models.load_finetuned(e.model, Path(e.adapter) if e.adapter else None)
    start = time.monotonic() - began
    # In turn from each set, whose prompts and completions have other lengths.
    mixed = [one for row in itertools.zip_longest(*sets.values()) for one in row if one is not None]

    def measure(n: int) -> tuple[int, float]:
        context.progress("measure: generate", 0.0, f"{n} prompts")
        since = time.monotonic()
        asked = mixed[:n]
        for _ in complete_each(model, tokenizer, asked, "harmful", e.generation):
            pass
        return len(asked), time.monotonic() - since

    few, brief = measure(_FEW)
    if brief > _LONGEST or few == rows:
        more, long, each = few, brief, brief / few
    else:
        more, long = measure(_MORE)
        each = max(0.0, long - brief) / max(1, more - few)
    linear = start + long / more * rows  # as if larger batches were no faster
    fit = start + long + each * max(0, rows - more)
    return TimeEstimate(
        "generation",
        (fit * linear) ** 0.5,
        _FASTER * min(fit, linear),
        _SLOWER * max(fit, linear),
        f"{rows} prompts, {more} measured in {long:.1f} s, up to {e.generation.max_new_tokens} tokens each",
    )
