"""Rates with intervals, comparisons over seeds and over prompts, planning, agreement of judges. Imports no torch.

Rates and scores are shares from 0 to 1. An unscored item enters no rate; it is counted beside it.
"""

from __future__ import annotations

from stayaligned.evaluation.metrics.agreement import agreement, confusion
from stayaligned.evaluation.metrics.comparisons import (
    McNemar,
    PairedDifference,
    ScoreDifference,
    holm,
    mcnemar,
    paired_bootstrap,
    paired_difference,
)
from stayaligned.evaluation.metrics.intervals import (
    Interval,
    bootstrap_interval,
    exact_interval,
    t_interval,
    wilson_interval,
)
from stayaligned.evaluation.metrics.paired import MeanOfPrompts, mean_of_prompts
from stayaligned.evaluation.metrics.planning import (
    detectable_difference,
    discordance,
    expected_difference,
    needed_n,
    paired_needed_n,
    paired_power,
    power,
)
from stayaligned.evaluation.metrics.rates import (
    across_seeds,
    harm_metrics,
    judge_metrics,
    mean_score,
    over_refusal,
    rate,
)

__all__ = [
    "Interval",
    "McNemar",
    "MeanOfPrompts",
    "PairedDifference",
    "ScoreDifference",
    "across_seeds",
    "agreement",
    "bootstrap_interval",
    "confusion",
    "detectable_difference",
    "discordance",
    "exact_interval",
    "expected_difference",
    "harm_metrics",
    "holm",
    "judge_metrics",
    "mcnemar",
    "mean_of_prompts",
    "mean_score",
    "needed_n",
    "over_refusal",
    "paired_bootstrap",
    "paired_difference",
    "paired_needed_n",
    "paired_power",
    "power",
    "rate",
    "t_interval",
    "wilson_interval",
]
