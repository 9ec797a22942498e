"""Two models on the same seeds or the same prompts, and many comparisons at once."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from stayaligned.metrics.intervals import Interval, t_interval, wilson_interval


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """Candidate minus reference, paired by seed."""

    pairs: tuple[tuple[int, float], ...]
    """Seed and difference, of the seeds in which both have a value, in order of the seed."""
    unpaired: tuple[int, ...]
    """Seeds in which one of the two has no value."""
    mean: float | None
    low: float | None
    high: float | None
    """95 % t interval over the pairs; None below two of them."""
    n_lower: int
    n_higher: int
    p_value: float
    """Two-sided exact sign test; ties say nothing. It can't fall below 2·0.5ⁿ: 0.0625 with five seeds."""


def paired_difference(candidate: Mapping[int, float | None], reference: Mapping[int, float | None]) -> PairedDifference:
    """Compare two arms seed by seed; what the seeds share (data order, initialization) cancels out."""
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


@dataclass(frozen=True, slots=True)
class McNemar:
    """Two models on the same prompts: where they differ, which way, and whether chance explains it."""

    n: int
    """Prompts scored for both."""
    n_unscored: int
    """Prompts that lack one of the two scores."""
    only_first: int
    only_second: int
    difference: float | None
    """Share of True, first minus second; None where n = 0."""
    low: float | None
    high: float | None
    """95 % interval of the difference, Newcombe's method 10 for paired proportions."""
    p_value: float
    """Exact two-sided test that both are equally often True."""


def mcnemar(first: Mapping[str, bool | None], second: Mapping[str, bool | None]) -> McNemar:
    """McNemar's exact test on prompts that both answered, keyed by id; None and missing ids are unscored."""
    cells: Counter[tuple[bool, bool]] = Counter()
    ids = {*first, *second}
    for key in ids:
        ours, theirs = first.get(key), second.get(key)
        if ours is not None and theirs is not None:
            cells[ours, theirs] += 1
    n = cells.total()
    both, only_first, only_second = cells[True, True], cells[True, False], cells[False, True]
    bounds = _newcombe_interval(both, only_first, only_second, cells[False, False]) if n else (None, None)
    return McNemar(
        n=n,
        n_unscored=len(ids) - n,
        only_first=only_first,
        only_second=only_second,
        difference=(only_first - only_second) / n if n else None,
        low=bounds[0],
        high=bounds[1],
        p_value=_sign_test(only_first, only_second),
    )


def _sign_test(lower: int, higher: int) -> float:
    """Two-sided exact binomial test of equal chances, P(|X - n/2| ≥ |observed - n/2|), X ~ B(n, 1/2)."""
    n = lower + higher
    tail = sum(math.comb(n, k) for k in range(min(lower, higher) + 1))
    return min(1.0, 2 * tail / 2**n)


def _newcombe_interval(both: int, only_first: int, only_second: int, neither: int) -> Interval:
    """Interval of p1 - p2 from paired data (Newcombe 1998, Statistics in Medicine 17:2635, method 10).

    Wilson's intervals of the two margins, combined by squares and corrected for their correlation φ, whose
    numerator is reduced by n/2 (not below 0) where it is positive.
    """
    n = both + only_first + only_second + neither
    p1, p2 = (both + only_first) / n, (both + only_second) / n
    low1, high1 = wilson_interval(both + only_first, n)
    low2, high2 = wilson_interval(both + only_second, n)
    margins = (both + only_first) * (only_second + neither) * (both + only_second) * (only_first + neither)
    cross = both * neither - only_first * only_second
    phi = (max(cross - n / 2, 0) if cross > 0 else cross) / math.sqrt(margins) if margins else 0.0
    below = (p1 - low1) ** 2 - 2 * phi * (p1 - low1) * (high2 - p2) + (high2 - p2) ** 2
    above = (high1 - p1) ** 2 - 2 * phi * (high1 - p1) * (p2 - low2) + (p2 - low2) ** 2
    return p1 - p2 - math.sqrt(max(0.0, below)), p1 - p2 + math.sqrt(max(0.0, above))


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for their number after Holm (1979), in the order given.

    Rejecting those at or below α rejects a true hypothesis with probability at most α, however they depend on each
    other: the k-th smallest of m is multiplied by m - k + 1, kept rising, cut at 1.
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted = [1.0] * len(p_values)
    reached = 0.0
    for rank, index in enumerate(order):
        reached = max(reached, min(1.0, (len(order) - rank) * p_values[index]))
        adjusted[index] = reached
    return adjusted
