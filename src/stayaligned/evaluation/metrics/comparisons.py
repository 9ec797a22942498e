"""Two models on the same seeds or the same prompts, and many comparisons at once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from stayaligned.evaluation.metrics.intervals import bootstrap_interval, t_interval
from stayaligned.evaluation.metrics.paired import mean_of_prompts


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
    """95 % interval of the difference, as of `metrics.prompts`."""
    p_value: float
    """Exact two-sided test that both are equally often True."""


def mcnemar(first: Mapping[str, bool | None], second: Mapping[str, bool | None]) -> McNemar:
    """McNemar's exact test on prompts that both answered, keyed by id; None and missing ids are unscored."""
    ids = {*first, *second}
    pairs = {key: (first.get(key), second.get(key)) for key in ids}
    differences = {key: int(a) - int(b) for key, (a, b) in pairs.items() if a is not None and b is not None}
    n, only_first, only_second = len(differences), *(sum(d == sign for d in differences.values()) for sign in (1, -1))
    low, high = mean_of_prompts({0: differences}).interval() if n else (None, None)
    return McNemar(
        n=n,
        n_unscored=len(ids) - n,
        only_first=only_first,
        only_second=only_second,
        difference=(only_first - only_second) / n if n else None,
        low=low,
        high=high,
        p_value=_sign_test(only_first, only_second),
    )


def _sign_test(lower: int, higher: int) -> float:
    """Two-sided exact binomial test of equal chances, P(|X - n/2| ≥ |observed - n/2|), X ~ B(n, 1/2)."""
    n = lower + higher
    tail = sum(math.comb(n, k) for k in range(min(lower, higher) + 1))
    return min(1.0, 2 * tail / 2**n)


@dataclass(frozen=True, slots=True)
class ScoreDifference:
    """Two models' scores on the same prompts, first minus second."""

    n: int
    """Prompts scored for both."""
    n_unscored: int
    """Prompts that lack one of the two scores."""
    difference: float | None
    low: float | None
    high: float | None
    """95 % bootstrap interval; None where the differences don't vary."""


def paired_bootstrap(
    first: Mapping[str, float | None], second: Mapping[str, float | None], *, confidence: float = 0.95, seed: int = 0
) -> ScoreDifference:
    """The difference of mean scores on prompts that both answered, on any scale, by resampling prompts (BCa).

    Deterministic by `seed`. It supposes no shape and no bounds, and wants a few hundred prompts: for few of them, or
    differences that are mostly zero, `mean_of_prompts` on a bounded scale is the one that holds.
    """
    ids = sorted({*first, *second})
    pairs = [(first.get(key), second.get(key)) for key in ids]
    differences = [ours - theirs for ours, theirs in pairs if ours is not None and theirs is not None]
    low, high = bootstrap_interval(differences, confidence=confidence, seed=seed) or (None, None)
    mean = math.fsum(differences) / len(differences) if differences else None
    return ScoreDifference(len(differences), len(ids) - len(differences), mean, low, high)


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
