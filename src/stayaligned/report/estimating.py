"""Estimates of one arm: means with intervals over its seeds and prompts, from the evidence where there is any."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean

from stayaligned.core.records import HARM_METRICS, HARM_SETS, PLAIN_SETS, Metric, Outcome, PromptSet
from stayaligned.evaluation.metrics import MeanOfPrompts, mean_of_prompts, mean_of_seeds
from stayaligned.evaluation.results import Evidence, JudgeReading, Result
from stayaligned.report.texts import scale_position
from stayaligned.report.values import CategoryRate, Estimate, MetricKind, ScoredPrompt

RunWithRows = tuple[Result, Sequence[Evidence]]
"""A result and its evidence; the evidence may be missing (empty)."""

_OUTCOMES = {
    "refusal_rate": ("harmful", Outcome.REFUSE),
    "other_rate": ("harmful", Outcome.OTHER),
    "over_refusal": ("benign", Outcome.REFUSE),
    **{HARM_METRICS[name]: (name, Outcome.HARM) for name in HARM_SETS},
}
"""Prompt set and outcome of the rates that judges give."""
_SCORED_SETS = {"finetune_accuracy": "task", "skills_kept": "skills"}
"""Prompt set of the scores that tasks give."""


def estimate_metrics(runs: Sequence[RunWithRows], measured: Sequence[MetricKind]) -> dict[str, Estimate]:
    """Return the estimates of scores and of the primary judges' rates, by metric."""
    estimates: dict[str, Estimate] = {}
    for kind in measured:
        found = [(run, rows, metric) for run, rows in runs if (metric := run.metric(kind.name)) is not None]
        if not found:
            continue
        scored_by_task = any(score.name == kind.name for run, _, _ in found for score in run.scores)
        judge = "" if scored_by_task else found[0][0].judges[0].judge
        values = {
            run.seed: values_by_prompt(metric, "" if scored_by_task else run.judges[0].judge, rows)
            for run, rows, metric in found
        }
        estimates[kind.name] = _estimate(judge, {run.seed: metric for run, _, metric in found}, values)
    return estimates


def estimate_other_judges(runs: Sequence[RunWithRows]) -> list[Estimate]:
    """Return the estimates of every judge except the primary judge."""
    found: dict[tuple[str, str], dict[int, Metric]] = {}
    values: dict[tuple[str, str], dict[int, dict[str, ScoredPrompt]]] = {}
    for run, rows in runs:
        for reading in run.judges[1:]:
            for metric in reading.metrics:
                key = reading.judge, metric.name
                found.setdefault(key, {})[run.seed] = metric
                values.setdefault(key, {})[run.seed] = values_by_prompt(metric, reading.judge, rows)
    judges = dict.fromkeys(judge for judge, _ in found)
    keys = [key for judge in judges for key in found if key[0] == judge]
    return [_estimate(key[0], found[key], values[key]) for key in keys]


def estimate_categories(runs: Sequence[RunWithRows]) -> list[CategoryRate]:
    """Return the primary judges' rates by category of the prompt; scores on a judge's own scale are omitted."""
    found: dict[tuple[PromptSet, str, str], dict[int, Metric]] = {}
    values: dict[tuple[PromptSet, str, str], dict[int, dict[str, ScoredPrompt]]] = {}
    for run, rows in runs:
        readings: tuple[JudgeReading, ...] = run.judges[:1]
        by_category: dict[tuple[str, str], list[Evidence]] = {}
        for row in rows:
            by_category.setdefault((row.prompt_set, row.category), []).append(row)
        for reading in readings:
            for part in reading.categories:
                for metric in part.metrics:
                    if metric.name in _OUTCOMES:
                        key = part.prompt_set, part.category, metric.name
                        own = by_category.get((part.prompt_set, part.category), [])
                        found.setdefault(key, {})[run.seed] = metric
                        values.setdefault(key, {})[run.seed] = values_by_prompt(metric, reading.judge, own)
    rates: list[CategoryRate] = []
    for key, by_seed in found.items():
        estimate = _estimate("", by_seed, values[key])
        rates.append(CategoryRate(*key, estimate.mean, estimate.n, estimate.low, estimate.high))
    return rates


def values_by_prompt(metric: Metric, judge: str, rows: Sequence[Evidence]) -> dict[str, ScoredPrompt]:
    """Return the scored values of a metric in one run; equal keys in two runs are the same prompt.

    Empty for metrics that the evidence does not have, such as those of lm-eval.
    """
    value = _value_of(metric, judge, rows)
    copies: Counter[str] = Counter()
    found: dict[str, ScoredPrompt] = {}
    for row in rows:
        number = value(row)
        prompt = f"{row.prompt_set} {row.prompt}"
        copies[prompt] += 1
        if number is not None:
            found[f"{prompt} {copies[prompt]}"] = ScoredPrompt(number, f"{row.prompt_set} {row.group or row.prompt}")
    return found


def group_values(rows: Iterable[ScoredPrompt]) -> dict[str, list[float]]:
    """Return the values of each group of copies."""
    found: dict[str, list[float]] = {}
    for value, group in rows:
        found.setdefault(group, []).append(value)
    return found


def _value_of(metric: Metric, judge: str, rows: Sequence[Evidence]) -> Callable[[Evidence], float | None]:
    """Return the function from a row to its value of a metric, None for rows that do not count."""
    name = metric.name
    if name in _OUTCOMES:
        wanted, outcome = _OUTCOMES[name]

        def of_judge(row: Evidence) -> float | None:
            found = row.outcomes.get(judge) if row.prompt_set == wanted else None
            return None if found is None else float(found is outcome)

        return of_judge
    if name in _SCORED_SETS:
        return lambda row: row.score if row.prompt_set == _SCORED_SETS[name] else None
    if name == "degeneration":
        return lambda r: None if r.degenerate is None or r.prompt_set not in PLAIN_SETS else float(r.degenerate)
    if judge and any(judge in row.judge_scores for row in rows):
        # A judge has one score of its own.

        def of_scale(row: Evidence) -> float | None:
            found = row.judge_scores.get(judge) if row.prompt_set == "harmful" else None
            return None if found is None else scale_position(metric.scale, found)

        return of_scale
    return lambda row: None


def _estimate(judge: str, by_seed: Mapping[int, Metric], values: Mapping[int, Mapping[str, ScoredPrompt]]) -> Estimate:
    """Aggregate a metric over seeds, with the interval of `MeanOfPrompts` over seeds and prompts.

    A single scored seed keeps its own interval, over its prompts, unless some of these are copies. Without evidence,
    all seeds are taken to have the same prompts, and a prompt to have the same value in all of them: the interval is
    then wider than needed.
    """
    scored = {seed: metric for seed, metric in by_seed.items() if metric.value is not None}
    first = next(iter(by_seed.values()))
    name, (least, most) = first.name, first.scale
    if not scored:
        return Estimate(name, judge, by_seed, None, None, None, "none")
    known = {seed: values[seed] for seed in scored if values.get(seed)}
    grouped = {seed: group_values(rows.values()) for seed, rows in known.items()}
    if len(scored) == 1:
        (only,) = scored.values()
        if not any(len(grouped[seed]) < len(known[seed]) for seed in known):
            kind = "none" if only.low is None or only.high is None else "prompts"
            return Estimate(name, judge, by_seed, only.value, only.low, only.high, kind, known)
    if known.keys() == scored.keys():
        found = mean_of_prompts(grouped, ends=(0.0, 1.0))
    else:
        known = {}
        shares = {seed: scale_position(first.scale, metric.value or 0.0) for seed, metric in scored.items()}
        found = _mean_without_evidence(shares, min(metric.n for metric in scored.values()))
    mean, low, high = (least + (most - least) * share for share in (found.value, *found.interval()))
    return Estimate(name, judge, by_seed, mean, low, high, "seeds" if len(scored) > 1 else "prompts", known)


def _mean_without_evidence(shares: Mapping[int, float], n: int) -> MeanOfPrompts:
    mean = fmean(shares.values())
    return mean_of_seeds(shares, n, mean * (1 - mean), ends=(0.0, 1.0))
