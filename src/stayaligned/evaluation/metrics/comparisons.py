"""Comparisons of two models on the same seeds, and correction for many comparisons."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from stayaligned.evaluation.metrics.intervals import t_interval


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """The difference candidate minus reference, paired by seed."""

    pairs: tuple[tuple[int, float], ...]
    """(seed, difference) for the seeds in which both models have a value, ordered by seed."""
    unpaired: tuple[int, ...]
    """Seeds in which one of the two models has no value."""
    mean: float | None
    """Mean difference over the pairs; None without pairs."""
    low: float | None
    """Lower bound of the 95 % t interval over the pairs; None for fewer than two pairs."""
    high: float | None
    """Upper bound of the 95 % t interval over the pairs; None for fewer than two pairs."""
    n_lower: int
    """Number of pairs in which the candidate is lower."""
    n_higher: int
    """Number of pairs in which the candidate is higher."""
    p_value: float
    """P-value of the two-sided exact sign test, ties ignored. It is at least 2·0.5ⁿ: 0.0625 with five seeds."""


def paired_difference(candidate: Mapping[int, float | None], reference: Mapping[int, float | None]) -> PairedDifference:
    """Compare two arms seed by seed, so that what the seeds share (data order, initialization) cancels out."""
    pairs: list[tuple[int, float]] = []
    unpaired: list[int] = []
    for seed in sorted({*candidate, *reference}):
        ours, theirs = candidate.get(seed), reference.get(seed)
        if ours is None or theirs is None:
            unpaired.append(seed)
        else:
            pairs.append((seed, ours - theirs))
    differences = [difference for _, difference in pairs]
    low, high = t_interval(differences) or (None, None)
    n_lower, n_higher = sum(d < 0 for d in differences), sum(d > 0 for d in differences)
    return PairedDifference(
        pairs=tuple(pairs),
        unpaired=tuple(unpaired),
        mean=fmean(differences) if differences else None,
        low=low,
        high=high,
        n_lower=n_lower,
        n_higher=n_higher,
        p_value=_sign_test(n_lower, n_higher),
    )


def _sign_test(lower: int, higher: int) -> float:
    """Return the p-value of the two-sided exact sign test, P(|X - n/2| ≥ |observed - n/2|) with X ~ B(n, 1/2)."""
    n = lower + higher
    tail = sum(math.comb(n, k) for k in range(min(lower, higher) + 1))
    return min(1.0, 2 * tail / 2**n)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for multiple testing after Holm (1979), in the order given.

    Rejecting the hypotheses at or below α rejects any true hypothesis with probability at most α, whatever their
    dependence: the k-th smallest of m p-values is multiplied by m - k + 1, made non-decreasing, and cut at 1.
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted = [1.0] * len(p_values)
    reached = 0.0
    for rank, index in enumerate(order):
        reached = max(reached, min(1.0, (len(order) - rank) * p_values[index]))
        adjusted[index] = reached
    return adjusted
