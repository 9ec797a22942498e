"""Rates with intervals, comparisons, correction by labels, planning, and agreement of judges. Imports no torch.

Rates and scores are shares from 0 to 1. Unscored items are excluded from rates and counted separately.
"""

from __future__ import annotations

from stayaligned.evaluation.metrics.agreement import agreement
from stayaligned.evaluation.metrics.comparisons import (
    PairedDifference,
    holm,
    paired_difference,
)
from stayaligned.evaluation.metrics.corrected import CorrectedMean, LabelledValue, corrected_mean
from stayaligned.evaluation.metrics.intervals import (
    exact_interval,
    t_interval,
)
from stayaligned.evaluation.metrics.paired import MeanOfPrompts, mean_of_prompts, mean_of_seeds
from stayaligned.evaluation.metrics.planning import (
    ceiling_needed_n,
    ceiling_power,
    detectable_difference,
    discordance,
    needed_n,
    paired_needed_n,
    paired_power,
    power,
    smallest_limit,
)
from stayaligned.evaluation.metrics.rates import (
    across_seeds,
    harm_metrics,
    harm_rate,
    judge_metrics,
    mean_score,
    over_refusal,
    rate,
)

__all__ = [
    "CorrectedMean",
    "LabelledValue",
    "MeanOfPrompts",
    "PairedDifference",
    "across_seeds",
    "agreement",
    "ceiling_needed_n",
    "ceiling_power",
    "corrected_mean",
    "detectable_difference",
    "discordance",
    "exact_interval",
    "harm_metrics",
    "harm_rate",
    "holm",
    "judge_metrics",
    "mean_of_prompts",
    "mean_of_seeds",
    "mean_score",
    "needed_n",
    "over_refusal",
    "paired_difference",
    "paired_needed_n",
    "paired_power",
    "power",
    "rate",
    "smallest_limit",
    "t_interval",
]
