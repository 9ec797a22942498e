"""Confidence intervals of one rate or one mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev

Interval = tuple[float, float]
"""Lower and upper bound."""


def exact_interval(successes: int, n: int, *, confidence: float = 0.95) -> Interval:
    """Return the Clopper-Pearson interval of a proportion: the rates at which neither tail is below (1 - confidence)/2.

    By construction, its coverage is at least `confidence` at every rate and every n. Shorter intervals, such as
    Wilson's, fall below it near 0 and 1.

    Args:
        successes: Number of successes, from 0 to `n`.
        n: Number of trials, at least 1.
        confidence: Coverage, between 0 and 1.

    Raises:
        ValueError: if `n` is below 1 or `successes` is outside [0, n].
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"{successes} of {n} is not a proportion; expected n ≥ 1 and 0 ≤ successes ≤ n")
    from scipy.special import betaincinv

    tail = (1 - confidence) / 2
    low = 0.0 if successes == 0 else float(betaincinv(successes, n - successes + 1, tail))
    high = 1.0 if successes == n else float(betaincinv(successes + 1, n - successes, 1 - tail))
    return low, high


def t_interval(values: Sequence[float], *, confidence: float = 0.95) -> Interval | None:
    """Return Student's t interval of a mean, m ± t·s/√n with n - 1 degrees of freedom; None for fewer than two values.

    Use it for means over seeds: the unit is the run, so prompts of one run do not count as independent.
    """
    n = len(values)
    if n < 2:
        return None
    from scipy.special import stdtrit

    half = float(stdtrit(n - 1, (1 + confidence) / 2)) * stdev(values) / math.sqrt(n)
    mean = fmean(values)
    return mean - half, mean + half
