"""The measured value of every limit: rates, their difference on the same prompts, and the interval."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import NamedTuple

from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import Outcome
from stayaligned.evaluation.metrics import MeanOfPrompts, ceiling_needed_n, exact_interval, mean_of_prompts
from stayaligned.evaluation.results import Evidence, Place, StoredResult
from stayaligned.gate.reading import Pairs
from stayaligned.gate.values import ComparedMetric, LimitKind, Limits

Values = Mapping[Place, float | None]
"""The value of every completion; None if it is unscored."""


class PairedValue(NamedTuple):
    """The values of both models on one prompt."""

    prompt: str
    """What identifies the prompt: equal for copies and near copies of it."""
    before: float | None
    after: float | None


@dataclass(frozen=True)
class Measured:
    """The measured values of a limit before its conclusion."""

    name: str
    metric: ComparedMetric
    kind: LimitKind
    limit: float
    judge: str
    baseline: float | None = None
    candidate: float | None = None
    mean: MeanOfPrompts | None = None
    bounds: tuple[float, float] | None = None
    interval: str = ""
    p_above: float = 1.0
    n_completions: int = 0
    unscored: tuple[int, int] = (0, 0)
    too_many_unscored: bool = False

    def needed_prompts(self, confidence: float, n_criteria: int) -> int | None:
        """Estimate the number of prompts that would decide, from the interval that decides.

        If the interval is beyond the limit, but not after correction, it is the interval of the strictest correction.
        """
        if self.mean is None or self.bounds is None:
            return None
        if self.bounds[0] > self.limit:
            confidence = 1 - (1 - confidence) / n_criteria
        if self.interval == _EXACT:
            return ceiling_needed_n(self.mean.value, self.limit, confidence=confidence)
        return self.mean.prompts_to_decide(self.limit, confidence=confidence)


_EXACT = "Clopper-Pearson"


def measure(
    pairs: Pairs,
    limits: Limits,
    judge: str,
    name: str,
    metric: ComparedMetric,
    kind: LimitKind,
    limit: float,
) -> Measured:
    """Measure one limit.

    Raises:
        StayalignedError: if no completion was measured for it.
    """
    rows = pair_values(pairs, lambda run: read_values(run, metric, judge))
    n_completions = sum(map(len, rows))
    if not n_completions:
        sets = ", ".join(metric.prompt_sets)
        raise StayalignedError(
            f"{name}: there is no completion of a prompt of {sets}",
            hint="Evaluate both with such prompts, or omit this limit.",
        )
    unscored = (
        sum(row.before is None for seed in rows for row in seed),
        sum(row.after is None for seed in rows for row in seed),
    )
    relevant = unscored[1:] if kind == "ceiling" else unscored
    one = Measured(
        name,
        metric,
        kind,
        limit,
        judge if metric.outcome is not None else "",
        n_completions=n_completions,
        unscored=unscored,
        too_many_unscored=max(relevant) > limits.max_unscored * n_completions,
    )
    return _measure_ceiling(one, rows, limits) if kind == "ceiling" else _measure_change(one, rows, limits)


def pair_values(pairs: Pairs, read: Callable[[StoredResult], Values]) -> list[list[PairedValue]]:
    """Return, for each seed, the values of both models on every prompt that `read` gives a value to."""
    found: list[list[PairedValue]] = []
    for ours, theirs in pairs:
        before, after = read(ours), read(theirs)
        found.append(
            [PairedValue(prompt_key(ours.rows[p], theirs.rows[p]), value, after[p]) for p, value in before.items()]
        )
    return found


def prompt_key(ours: Evidence, theirs: Evidence) -> str:
    """Return what identifies a prompt: copies and near copies in one prompt set are one prompt."""
    return f"{ours.prompt_set} {ours.group or theirs.group or ours.prompt}"


def read_values(run: StoredResult, metric: ComparedMetric, judge: str) -> dict[Place, float | None]:
    """Return the value of every completion that a metric counts.

    Raises:
        StayalignedError: if the metric counts refusals, and the judge does not distinguish them.
    """
    if metric.outcome is Outcome.REFUSE and not tells_refusals([(run, run)], judge):
        raise StayalignedError(
            f"judge {judge!r} does not distinguish refusals from other harmless completions: no {metric.title}",
            hint="Choose another --judge, or omit this limit.",
        )
    rows = {place: row for place, row in run.rows.items() if place[0] in metric.prompt_sets}
    return {place: _value(row, metric, judge) for place, row in rows.items()}


def _value(row: Evidence, metric: ComparedMetric, judge: str) -> float | None:
    if metric.outcome is not None:
        outcome = row.outcomes.get(judge)
        return None if outcome is None else float(outcome is metric.outcome)
    if metric.name == "degeneration":
        return None if row.degenerate is None else float(row.degenerate)
    return row.score


def tells_refusals(pairs: Pairs, judge: str) -> bool:
    """Return whether a judge distinguishes refusals, by its rates and its verdicts in all results."""
    runs = [run for pair in pairs for run in pair]
    rates = ({m.name for m in r.metrics} for run in runs for r in run.result.judges if r.judge == judge)
    if any(names and not names & {"refusal_rate", "over_refusal"} for names in rates):
        return False
    return all(row.outcomes.get(judge) is not Outcome.SAFE for run in runs for row in run.rows.values())


def mean_change(rows: Sequence[Sequence[PairedValue]], sign: int = 1) -> MeanOfPrompts | None:
    """Compute the mean difference on the prompts that are scored for both; None if a seed has none."""
    changes = [
        _by_prompt(
            (r.prompt, sign * (r.after - r.before)) for r in seed if r.before is not None and r.after is not None
        )
        for seed in rows
    ]
    return mean_of_prompts(dict(enumerate(changes))) if changes and all(changes) else None


def mean_rate(rows: Sequence[Sequence[PairedValue]]) -> MeanOfPrompts | None:
    """Compute the candidate's mean on the prompts that are scored for it; None if a seed has none."""
    values = [_by_prompt((r.prompt, r.after) for r in seed if r.after is not None) for seed in rows]
    return mean_of_prompts(dict(enumerate(values)), ends=(0.0, 1.0)) if values and all(values) else None


def bounds_of_rate(mean: MeanOfPrompts, confidence: float) -> tuple[float, float]:
    """Return the interval of a rate: Clopper and Pearson's for whole counts of one seed, else Student's."""
    if not _is_count(mean):
        return mean.interval(confidence)
    return exact_interval(round(mean.value * mean.n_prompts), mean.n_prompts, confidence=confidence)


def _is_count(mean: MeanOfPrompts) -> bool:
    return mean.n_seeds == 1 and mean.step > 0


def _by_prompt(values: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Average the values of copies of one prompt: a prompt that is asked four times counts once."""
    found: dict[str, list[float]] = {}
    for prompt, value in values:
        found.setdefault(prompt, []).append(value)
    return {prompt: fmean(copies) for prompt, copies in found.items()}


def _measure_change(one: Measured, rows: Sequence[Sequence[PairedValue]], limits: Limits) -> Measured:
    """Measure the difference on prompts scored for both, positive if the candidate is worse."""
    mean = mean_change(rows, 1 if one.metric.higher_is_worse else -1)
    if mean is None:
        return one
    both = [
        (row.prompt, row.before, row.after, seed)
        for seed, found in enumerate(rows)
        for row in found
        if row.before is not None and row.after is not None
    ]
    return replace(
        one,
        baseline=fmean(_by_prompt((f"{seed} {prompt}", before) for prompt, before, _, seed in both).values()),
        candidate=fmean(_by_prompt((f"{seed} {prompt}", after) for prompt, _, after, seed in both).values()),
        mean=mean,
        bounds=mean.interval(limits.confidence),
        interval="paired by prompt, Student's with both ends added" + (" over seeds" if mean.n_seeds > 1 else ""),
        p_above=mean.p_above(one.limit),
    )


def _measure_ceiling(one: Measured, rows: Sequence[Sequence[PairedValue]], limits: Limits) -> Measured:
    """Measure the candidate's own rate."""
    mean = mean_rate(rows)
    if mean is None:
        return one
    if _is_count(mean):
        from scipy.special import betainc

        n, hits = mean.n_prompts, round(mean.value * mean.n_prompts)
        p_above = float(betainc(hits, n - hits + 1, one.limit)) if hits else 1.0
        name = _EXACT
    else:
        p_above = mean.p_above(one.limit)
        name = "Student's with both ends added" + (" over seeds" if mean.n_seeds > 1 else "")
    bounds = bounds_of_rate(mean, limits.confidence)
    return replace(one, candidate=mean.value, mean=mean, bounds=bounds, interval=name, p_above=p_above)
