"""Differences of arms from the reference arm, paired by seed or, for one seed, by prompt, with Holm's correction."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean, stdev

from stayaligned.core.records import Outcome
from stayaligned.evaluation.metrics import PairedDifference, holm, mcnemar, paired_difference
from stayaligned.evaluation.results import Evidence
from stayaligned.report.values import ArmDifference, Estimate

ROUNDING = 1e-9
_LEVEL = 0.05

EvidenceByRun = Sequence[Sequence[Evidence]]
"""The evidence of each run of an arm; empty for runs without evidence."""


def compare(
    estimates: Mapping[str, Mapping[str, Estimate]], rows: Mapping[str, EvidenceByRun], reference: str | None
) -> dict[str, dict[str, ArmDifference]]:
    """Compute each other arm's differences from the reference arm, by metric.

    A difference is resolved if its p-value, with Holm's correction over all differences of the table, is below 0.05.
    The test is Student's paired t-test over seeds; for one seed, McNemar's test on the prompts scored for both arms.
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


def _difference(ours: Estimate, theirs: Estimate, our_rows: EvidenceByRun, their_rows: EvidenceByRun) -> ArmDifference:
    paired = paired_difference(
        {seed: metric.value for seed, metric in ours.by_seed.items()},
        {seed: metric.value for seed, metric in theirs.by_seed.items()},
    )
    if len(ours.by_seed) == len(theirs.by_seed) == 1 and our_rows[0] and their_rows[0]:
        return _compare_by_prompt(ours.name, ours.judge, paired, our_rows[0], their_rows[0])
    return ArmDifference(
        _clip_to_scale(paired, ours.scale), _intervals_are_disjoint(paired, ours, theirs), _p_value(paired)
    )


def _p_value(paired: PairedDifference) -> float | None:
    """Return the p-value of Student's two-sided test that the pairs' mean is 0; None if the pairs have no spread."""
    values = [difference for _, difference in paired.pairs]
    if paired.low is None or paired.high is None or paired.high - paired.low <= ROUNDING:
        return None
    from scipy.special import stdtr

    return 2 * float(stdtr(len(values) - 1, -abs(fmean(values)) / (stdev(values) / math.sqrt(len(values)))))


def _compare_by_prompt(
    name: str, judge: str, paired: PairedDifference, ours: Sequence[Evidence], theirs: Sequence[Evidence]
) -> ArmDifference:
    """Run McNemar's test on the prompts scored for both arms; metrics that are not shares of prompts are not tested."""
    first, second = (_hits_by_prompt(name, judge, rows) for rows in (ours, theirs))
    if not first.keys() & second.keys():
        return ArmDifference(paired, resolved=False, p_value=None)
    found = mcnemar(first, second)
    return ArmDifference(replace(paired, low=found.low, high=found.high), resolved=False, p_value=found.p_value)


def _hits_by_prompt(name: str, judge: str, rows: Sequence[Evidence]) -> dict[str, bool | None]:
    """Return, by prompt, whether a completion counts toward a metric; None is unscored."""
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


def _clip_to_scale(paired: PairedDifference, scale: tuple[float, float]) -> PairedDifference:
    """Clip the interval of a difference to the possible differences on the scale.

    Equal differences in every seed (for example both arms at 0 %) have no spread and get no interval: an interval of
    width zero would suggest a certainty that the prompts do not support.
    """
    if paired.low is None or paired.high is None:
        return paired
    if paired.high - paired.low <= ROUNDING:
        return replace(paired, low=None, high=None)
    width = scale[1] - scale[0]
    return replace(paired, low=max(-width, paired.low), high=min(width, paired.high))


def _intervals_are_disjoint(paired: PairedDifference, ours: Estimate, theirs: Estimate) -> bool:
    """Whether all pairs are equal and the arms' own intervals, over prompts, are disjoint."""
    if paired.low is None or paired.high is None or paired.high - paired.low > ROUNDING:
        return False
    if ours.low is None or ours.high is None or theirs.low is None or theirs.high is None:
        return False
    return ours.high < theirs.low or theirs.high < ours.low
