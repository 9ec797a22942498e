"""Rates with intervals, comparisons over seeds and over prompts, planning, agreement of judges. Imports no torch.

Rates and scores are shares from 0 to 1. An unscored item enters no rate; it is counted beside it.
"""

from __future__ import annotations

from stayaligned.metrics.agreement import agreement, confusion
from stayaligned.metrics.comparisons import McNemar, PairedDifference, holm, mcnemar, paired_difference
from stayaligned.metrics.intervals import Interval, bootstrap_interval, t_interval, wilson_interval
from stayaligned.metrics.planning import needed_n
from stayaligned.metrics.rates import across_seeds, harm_metrics, judge_metrics, mean_score, over_refusal, rate

__all__ = [
    "Interval",
    "McNemar",
    "PairedDifference",
    "across_seeds",
    "agreement",
    "bootstrap_interval",
    "confusion",
    "harm_metrics",
    "holm",
    "judge_metrics",
    "mcnemar",
    "mean_score",
    "needed_n",
    "over_refusal",
    "paired_difference",
    "rate",
    "t_interval",
    "wilson_interval",
]
