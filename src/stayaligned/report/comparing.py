"""Arms against the reference: paired by seed, or of one seed by prompt; corrected over the whole table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean, stdev

from stayaligned.core.records import Outcome
from stayaligned.evaluation.metrics import PairedDifference, holm, mcnemar, paired_difference
from stayaligned.evaluation.results import Evidence
from stayaligned.report.values import Difference, Estimate

ROUNDING = 1e-9
_LEVEL = 0.05

Rows = Sequence[Sequence[Evidence]]
"""The evidence of each run of an arm; empty where it was not given."""


def compare(
    estimates: Mapping[str, Mapping[str, Estimate]], rows: Mapping[str, Rows], reference: str | None
) -> dict[str, dict[str, Difference]]:
    """Each arm's differences from the reference, by metric; of the reference itself none.

    A difference counts as shown where its p-value, corrected after Holm over all differences of the table, is below
    0.05. Over seeds it is Student's, of the pairs; of one seed McNemar's, of the prompts that both arms answered.
    """
    if reference is None:
        return {}
    theirs = estimates[reference]
    found = {
        name: {
            metric: _difference(ours[metric], theirs[metric], rows[name], rows[reference])
            for metric in ours
            if metric in theirs
        }
        for name, ours in estimates.items()
        if name != reference
    }
    tested = [(name, metric) for name, of in found.items() for metric in of if of[metric].p_value is not None]
    corrected = holm([found[name][metric].p_value or 0.0 for name, metric in tested])
    for (name, metric), p_value in zip(tested, corrected, strict=True):
        found[name][metric] = replace(found[name][metric], p_value=p_value, resolved=p_value < _LEVEL)
    return found


def _difference(ours: Estimate, theirs: Estimate, our_rows: Rows, their_rows: Rows) -> Difference:
    paired = paired_difference(
        {seed: metric.value for seed, metric in ours.by_seed.items()},
        {seed: metric.value for seed, metric in theirs.by_seed.items()},
    )
    if len(ours.by_seed) == len(theirs.by_seed) == 1 and our_rows[0] and their_rows[0]:
        return _by_prompts(ours.name, ours.judge, paired, our_rows[0], their_rows[0])
    return Difference(_clipped(paired, ours.scale), _parted(paired, ours, theirs), _p_value(paired))


def _p_value(paired: PairedDifference) -> float | None:
    """Two-sided, of Student's test that the pairs' mean is 0; None where there is no spread to judge by."""
    values = [difference for _, difference in paired.pairs]
    if paired.low is None or paired.high is None or paired.high - paired.low <= ROUNDING:
        return None
    from scipy.special import stdtr

    return 2 * float(stdtr(len(values) - 1, -abs(fmean(values)) / (stdev(values) / math.sqrt(len(values)))))


def _by_prompts(
    name: str, judge: str, paired: PairedDifference, ours: Sequence[Evidence], theirs: Sequence[Evidence]
) -> Difference:
    """McNemar's test on the prompts that both answered; no difference is claimed of what is no share of prompts."""
    first, second = (_hits(name, judge, rows) for rows in (ours, theirs))
    if not first.keys() & second.keys():
        return Difference(paired, resolved=False, p_value=None)
    found = mcnemar(first, second)
    return Difference(replace(paired, low=found.low, high=found.high), resolved=False, p_value=found.p_value)


def _hits(name: str, judge: str, rows: Sequence[Evidence]) -> dict[str, bool | None]:
    """Whether each answer counts for a metric, by its prompt; None is unscored."""
    wanted = {
        "harmful_score": ("harmful", Outcome.HARM),
        "refusal_rate": ("harmful", Outcome.REFUSE),
        "other_rate": ("harmful", Outcome.OTHER),
        "over_refusal": ("benign", Outcome.REFUSE),
    }
    if name in wanted:
        prompt_set, outcome = wanted[name]
        judged = [row for row in rows if row.prompt_set == prompt_set and judge in row.outcomes]
        return {row.prompt: None if row.outcomes[judge] is None else row.outcomes[judge] is outcome for row in judged}
    if name == "degeneration":
        return {f"{row.prompt_set} {row.prompt}": row.degenerate for row in rows if row.degenerate is not None}
    scored = {"finetune_accuracy": "task", "skills_kept": "skills"}.get(name)
    values = {row.prompt: row.score for row in rows if row.prompt_set == scored}
    whole = all(value in (None, 0.0, 1.0) for value in values.values())
    return {prompt: None if value is None else value == 1.0 for prompt, value in values.items()} if whole else {}


def _clipped(paired: PairedDifference, scale: tuple[float, float]) -> PairedDifference:
    """The difference with its interval cut to what two values on the scale can differ by.

    Equal differences in every seed (both arms at 0 %, say) have no spread, and so no interval: a width of zero would
    claim a certainty that the prompts do not give.
    """
    if paired.low is None or paired.high is None:
        return paired
    if paired.high - paired.low <= ROUNDING:
        return replace(paired, low=None, high=None)
    width = scale[1] - scale[0]
    return replace(paired, low=max(-width, paired.low), high=min(width, paired.high))


def _parted(paired: PairedDifference, ours: Estimate, theirs: Estimate) -> bool:
    """Where all pairs are equal: whether the arms' own intervals, of the prompts, lie apart."""
    if paired.low is None or paired.high is None or paired.high - paired.low > ROUNDING:
        return False
    if ours.low is None or ours.high is None or theirs.low is None or theirs.high is None:
        return False
    return ours.high < theirs.low or theirs.high < ours.low
