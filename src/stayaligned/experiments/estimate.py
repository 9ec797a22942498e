"""Measure some steps and completions of an experiment on this machine, and extrapolate to the whole run."""

from __future__ import annotations

import contextlib
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stayaligned.core.progress import Progress
from stayaligned.core.records import Example, PromptSet
from stayaligned.defenses import TrainingDefense
from stayaligned.experiments.align import align
from stayaligned.experiments.config.alignment import Alignment
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


@dataclass(frozen=True)
class StepTimes:
    """Measured seconds of a training's steps."""

    start: float
    """Until the first step has ended."""
    mean: float
    low: float
    high: float
    """Between which the mean of a whole run is expected."""
    steps: int
    """Number of steps that were measured."""
    planned: int | None
    """Number of steps of the whole training, as the trainer counts them."""

    def of(self, steps: int) -> tuple[float, float, float]:
        """Return the seconds of a training, and the ends of their range."""
        return self.start + steps * self.mean, self.start + steps * self.low, self.start + steps * self.high


class _EnoughError(Exception):
    """Ends a training whose steps have been measured."""


def measure_training(experiment: Experiment, progress: Progress) -> StepTimes:
    """Train a few steps as the run will, in a temporary directory.

    Of a defense with phases, the steps are a short cycle with phases of the same shares.

    Raises:
        StayalignedError: if the run's training would raise it.
    """
    from stayaligned.experiments.stages.train import train_into

    short = experiment.model_copy(update={"defenses": tuple(map(_short_cycle, experiment.defenses)), "watch": None})

    def train(place: Path, count: Progress) -> None:
        target = place / "product"
        target.mkdir()
        train_into(Context(short, Store(place), count), target)

    return _measure_steps(train, progress)


def measure_alignment(alignment: Alignment, progress: Progress) -> StepTimes:
    """Train a few steps as `align` will, in a temporary directory.

    Raises:
        StayalignedError: if `align` would raise it.
    """
    return _measure_steps(lambda place, count: align(alignment, place / "out", progress=count), progress)


def _measure_steps(train: Callable[[Path, Progress], object], progress: Progress) -> StepTimes:
    ends: list[float] = []
    planned: list[int] = []

    def count(work: str, share: float, detail: str = "") -> None:
        progress(f"measure: {work}", min(1.0, len(ends) / _STEPS), detail)
        if detail.startswith("step "):
            ends.append(time.monotonic())
            planned[:] = [int(detail.split(",")[0].rpartition(" ")[2])]
            if len(ends) > _STEPS or (len(ends) > 2 and ends[-1] - ends[0] > _LONGEST):
                raise _EnoughError

    began = time.monotonic()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place, contextlib.suppress(_EnoughError):
        train(Path(place), count)
    times = [after - before for before, after in itertools.pairwise(ends)] or [time.monotonic() - began]
    mean = statistics.fmean(times)
    error = 2 * statistics.stdev(times) / len(times) ** 0.5 if len(times) > 1 else mean
    low, high = min(_FASTER * mean, max(mean - error, min(times))), max(_SLOWER * mean, mean + error)
    return StepTimes((ends[0] if ends else began) - began, mean, low, high, len(times), next(iter(planned), None))


def estimate_trainings(lengths: Sequence[tuple[StepTimes, int]]) -> TimeEstimate:
    """Extrapolate from the measured steps of each training to its number of steps."""
    seconds, low, high = (sum(part) for part in zip(*(times.of(steps) for times, steps in lengths), strict=True))
    kinds = list(dict.fromkeys(times for times, _ in lengths))
    total = sum(steps for _, steps in lengths)
    count = sum(times.steps for times in kinds)
    each = " to ".join(dict.fromkeys(f"{pick(times.mean for times in kinds):.3g}" for pick in (min, max)))
    what = f"{len(lengths)} trainings, {total} steps" if len(lengths) > 1 else f"{total} steps"
    start = max(times.start for times in kinds)
    return TimeEstimate(
        "training", seconds, low, high, f"{what}, {count} measured: {each} s each, after {start:.0f} s to start"
    )


def training_cost(experiment: Experiment) -> str:
    """Return what trainings whose steps take equally long have in common; rates, lengths and seeds do not count."""
    e = experiment
    sizes = ("batch", "accumulation", "checkpointing", "bf16", "fp16", "optim", "packing", "length")
    training = {name: value for name, value in (e.training or {}).items() if any(size in name for size in sizes)}
    words = {key: value for key, value in e.training_defense.spec().items() if isinstance(value, str | bool)}
    return repr((e.model, e.lora, e.trainer, e.max_length, training, words))


def generation_cost(experiment: Experiment) -> str:
    """Return what completions that take equally long have in common."""
    fields = {"model", "chat_template", "task", "skills", "harmful_prompts", "benign_prompts", "limit", "generation"}
    return repr((experiment.model_dump(mode="json", include=fields), experiment.harm_sets))


def _short_cycle(defense: Any) -> Any:
    first, second = getattr(defense, "alignment_steps", 0), getattr(defense, "finetuning_steps", 0)
    if not isinstance(defense, TrainingDefense) or not first or not second:
        return defense
    aligned = min(_STEPS - 1, max(1, round(_STEPS * first / (first + second))))
    return defense.model_copy(update={"alignment_steps": aligned, "finetuning_steps": _STEPS - aligned})


def estimate_generation(experiment: Experiment, progress: Progress, *, runs: int = 1) -> TimeEstimate | None:
    """Generate completions of a few prompts with the aligned model, and extrapolate to all prompts; None without any.

    Args:
        experiment: the experiment.
        progress: called with what is being done.
        runs: number of models that answer the same prompts.

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
            one = _measure_completions(context, sets, rows)
    times = f"{runs} times " if runs > 1 else ""
    return TimeEstimate(one.part, runs * one.seconds, runs * one.low, runs * one.high, f"{times}{one.measured}")


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
