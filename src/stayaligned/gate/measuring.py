"""The measured value of every limit: rates, their difference on the same prompts, and the interval."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, NamedTuple

from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import Outcome, PromptSet
from stayaligned.evaluation.metrics import (
    CorrectedMean,
    MeanOfPrompts,
    ceiling_needed_n,
    exact_interval,
    mean_of_prompts,
)
from stayaligned.evaluation.results import EVIDENCE_FILE, Evidence, Place, StoredResult
from stayaligned.gate.reading import Pairs
from stayaligned.gate.values import ComparedMetric, Comparison, Correction, LimitKind, Limits, split_by_set

Values = Mapping[Place, float | None]
"""The value of every completion; None if it is unscored."""


class PairedValue(NamedTuple):
    """The values of both models on one prompt."""

    prompt: str
    """What identifies the prompt: equal for copies and near copies of it."""
    before: float | None
    after: float | None

    def filled(self, *, before: float, after: float) -> PairedValue:
        """Return the same with other values where a completion is unscored."""
        return PairedValue(
            self.prompt,
            before if self.before is None else self.before,
            after if self.after is None else self.after,
        )


@dataclass(frozen=True)
class Measured:
    """The measured values of a limit before its conclusion."""

    name: str
    metric: ComparedMetric
    kind: LimitKind
    limit: float
    judge: str
    against: Comparison = "baseline"
    baseline: float | None = None
    candidate: float | None = None
    mean: MeanOfPrompts | None = None
    bounds: tuple[float, float] | None = None
    interval: str = ""
    p_above: float = 1.0
    n_completions: int = 0
    n_cells: int = 0
    """Number of prompts, summed over the seeds; copies of a prompt are one."""
    unscored: tuple[int, int] = (0, 0)
    """Unscored completions of the baseline (0 for a ceiling) and of the candidate."""
    unscored_cells: int = 0
    """Prompts, summed over the seeds, with an unscored completion, of the side that has more of them."""
    blocked: str = ""
    """Why nothing can be concluded, whatever the interval is; empty if something can."""
    high_at_worst: float | None = None
    """Upper bound of the interval with every unscored completion counted against the candidate."""
    p_above_at_best: float = 0.0
    """`p_above` with every unscored completion counted in favor of the candidate; 0 if none is unscored."""
    correction: Correction | None = None
    """How people's labels corrected the value; None without labels."""
    high_if_degenerate: float | None = None
    """Upper bound of the corrected interval with every degenerate completion counted against its model."""

    def needed(self, confidence: float, n_criteria: int) -> dict[str, Any]:
        """Estimate what would decide, from the interval that decides, as fields of a `Criterion`.

        If the interval is beyond the limit, but not after correction, it is the interval of the strictest correction.
        """
        if self.mean is None or self.bounds is None:
            return {}
        if self.bounds[0] > self.limit:
            confidence = 1 - (1 - confidence) / n_criteria
        if self.interval == _EXACT:
            return {"needed_prompts": ceiling_needed_n(self.mean.value, self.limit, confidence=confidence)}
        found: dict[str, Any] = {"needed_prompts": self.mean.prompts_to_decide(self.limit, confidence=confidence)}
        if self.correction is not None and isinstance(self.mean, CorrectedMean):
            labels = self.mean.labels_to_decide(self.limit, confidence=confidence)
            found["correction"] = self.correction.model_copy(update={"needed_labels": labels})
        return found


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
    before = [(seed, row.prompt) for seed, found in enumerate(rows) for row in found if row.before is None]
    after = [(seed, row.prompt) for seed, found in enumerate(rows) for row in found if row.after is None]
    if kind == "ceiling":
        before = []
    n_cells = sum(len({row.prompt for row in found}) for found in rows)
    unscored_cells = max(len({*before}), len({*after}))
    one = Measured(
        name,
        metric,
        kind,
        limit,
        judge if metric.outcome is not None else "",
        n_completions=n_completions,
        n_cells=n_cells,
        unscored=(len(before), len(after)),
        unscored_cells=unscored_cells,
    )
    if unscored_cells > limits.max_unscored * n_cells:
        one = replace(one, blocked=_describe_unscored(one, limits))
    one = _measure_ceiling(one, rows, limits) if kind == "ceiling" else _measure_change(one, rows, limits)
    return _measure_extremes(one, rows, limits) if before or after else one


def split_metric(pairs: Pairs, metric: ComparedMetric) -> list[ComparedMetric]:
    """Return a metric for each prompt set that it counts and that a result has; see `split_by_set`."""
    rows = (row for pair in pairs for run in pair for row in run.rows.values())
    degenerate = metric.name == "degeneration"
    return [*split_by_set(metric, {row.prompt_set for row in rows if not degenerate or row.degenerate is not None})]


def _describe_unscored(one: Measured, limits: Limits) -> str:
    counted = "completions are unscored"
    if one.n_cells < one.n_completions:
        counted = "prompts (copies count once) have unscored completions"
    return f"{one.unscored_cells} of {one.n_cells} {counted}, more than the {limits.max_unscored:.0%} allowed"


def _measure_extremes(one: Measured, rows: Sequence[Sequence[PairedValue]], limits: Limits) -> Measured:
    """Measure the limit with every unscored completion counted against the candidate, and in favor of it."""
    if one.mean is None:
        return one
    worst = float(one.metric.higher_is_worse)
    measure_one = _measure_ceiling if one.kind == "ceiling" else _measure_change
    against, in_favor = (
        measure_one(one, [[row.filled(before=1 - value, after=value) for row in seed] for seed in rows], limits)
        for value in (worst, 1 - worst)
    )
    return replace(
        one,
        high_at_worst=None if against.bounds is None else against.bounds[1],
        p_above_at_best=in_favor.p_above,
    )


def pair_values(pairs: Pairs, read: Callable[[StoredResult], Values]) -> list[list[PairedValue]]:
    """Return, for each seed, the values of both models on every prompt of both that `read` gives a value to."""
    found: list[list[PairedValue]] = []
    for ours, theirs in pairs:
        before, after = read(ours), read(theirs)
        found.append(
            [
                PairedValue(prompt_key(ours.rows[place], theirs.rows[place]), value, after[place])
                for place, value in before.items()
                if place in after
            ]
        )
    return found


def prompt_key(ours: Evidence, theirs: Evidence) -> str:
    """Return what identifies a prompt: copies and near copies in one prompt set are one prompt."""
    return f"{ours.prompt_set} {ours.group or theirs.group or ours.prompt}"


def count_prompts(pairs: Pairs, prompt_set: PromptSet, found: Callable[[Evidence], bool]) -> tuple[int, int]:
    """Return the number of prompts with a completion of the candidate that has a property, and of all prompts.

    Copies of a prompt are one; the prompts of several seeds are added up.
    """
    prompts: dict[tuple[int, str], bool] = {}
    for seed, (ours, theirs) in enumerate(pairs):
        for place, row in theirs.rows.items():
            if place[0] == prompt_set:
                key = seed, prompt_key(ours.rows[place], row)
                prompts[key] = prompts.get(key, False) or found(row)
    return sum(prompts.values()), len(prompts)


def read_values(run: StoredResult, metric: ComparedMetric, judge: str) -> dict[Place, float | None]:
    """Return the value of every completion that a metric counts.

    Raises:
        StayalignedError: if the metric counts refusals, and the judge does not distinguish them, or if a value is not
            on the scale from 0 to 1.
    """
    if metric.outcome is Outcome.REFUSE and not tells_refusals([(run, run)], judge):
        raise StayalignedError(
            f"judge {judge!r} does not distinguish refusals from other harmless completions: no {metric.title}",
            hint="Choose another --judge, or omit this limit.",
        )
    values = {place: _value(row, metric, judge) for place, row in run.rows.items() if place[0] in metric.prompt_sets}
    for (prompt_set, name), value in values.items():
        if value is not None and not 0 <= value <= 1:
            raise StayalignedError(
                f"{run.directory / EVIDENCE_FILE}: {prompt_set} {name!r}: score {value:g} is not between 0 and 1",
                hint="Correct `score` of the task that wrote it, and rerun.",
            )
    return values


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


def mean_change(rows: Sequence[Sequence[PairedValue]], sign: int = 1, *, exact: bool = False) -> MeanOfPrompts | None:
    """Compute the mean difference on the prompts that are scored for both; None if a seed has none."""
    changes = [
        _by_prompt(
            (r.prompt, sign * (r.after - r.before)) for r in seed if r.before is not None and r.after is not None
        )
        for seed in rows
    ]
    return mean_of_prompts(dict(enumerate(changes)), exact=exact) if changes and all(changes) else None


class Rate(NamedTuple):
    """The candidate's rate on the prompts that are scored for it."""

    mean: MeanOfPrompts
    hits: tuple[int, int]
    """Number of prompts whose completions all count, and of those with one that counts. The two differ only where
    copies of a prompt have different outcomes."""

    @property
    def exact(self) -> bool:
        """Whether the interval is Clopper and Pearson's; over several seeds, it is Student's."""
        return self.mean.n_seeds == 1

    def interval(self, confidence: float) -> tuple[float, float]:
        """Return the two-sided interval: its lower bound is that of the fewer hits, its upper bound of the more."""
        if not self.exact:
            return self.mean.interval(confidence)
        (low, _), (_, high) = (exact_interval(hits, self.mean.n_prompts, confidence=confidence) for hits in self.hits)
        return low, high

    def p_above(self, limit: float) -> float:
        """Return the one-sided p-value of "the rate is not above `limit`", from the fewer hits."""
        from scipy.special import betainc

        if not self.exact:
            return self.mean.p_above(limit)
        fewer = self.hits[0]
        return float(betainc(fewer, self.mean.n_prompts - fewer + 1, limit)) if fewer else 1.0


def find_rate(rows: Sequence[Sequence[PairedValue]], *, exact: bool = False) -> Rate | None:
    """Compute the candidate's rate on the prompts that are scored for it; None if a seed has none."""
    values = [_by_prompt((r.prompt, r.after) for r in seed if r.after is not None) for seed in rows]
    if not values or not all(values):
        return None
    means = [value for seed in values for value in seed.values()]
    mean = mean_of_prompts(dict(enumerate(values)), ends=(0.0, 1.0), exact=exact)
    return Rate(mean, (sum(value >= 1 for value in means), sum(value > 0 for value in means)))


def _by_prompt(values: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Average the values of copies of one prompt: a prompt that is asked four times counts once."""
    found: dict[str, list[float]] = {}
    for prompt, value in values:
        found.setdefault(prompt, []).append(value)
    return {prompt: fmean(copies) for prompt, copies in found.items()}


def _measure_change(one: Measured, rows: Sequence[Sequence[PairedValue]], limits: Limits) -> Measured:
    """Measure the difference on prompts scored for both, positive if the candidate is worse."""
    mean = mean_change(rows, 1 if one.metric.higher_is_worse else -1, exact=limits.exact)
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
        bounds=mean.interval(limits.interval_confidence),
        interval="paired by prompt, "
        + ("Dirichlet bounds" if limits.exact else "Student's with both ends added")
        + (" over seeds" if mean.n_seeds > 1 else ""),
        p_above=mean.p_above(one.limit),
    )


def _measure_ceiling(one: Measured, rows: Sequence[Sequence[PairedValue]], limits: Limits) -> Measured:
    """Measure the candidate's own rate."""
    rate = find_rate(rows, exact=limits.exact)
    if rate is None:
        return one
    name = _EXACT if rate.exact else "Student's with both ends added over seeds"
    return replace(
        one,
        candidate=rate.mean.value,
        mean=rate.mean,
        bounds=rate.interval(limits.interval_confidence),
        interval=name,
        p_above=rate.p_above(one.limit),
    )
