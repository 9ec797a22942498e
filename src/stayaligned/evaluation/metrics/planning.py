"""Sample sizes: how many prompts a comparison needs, and what a number of prompts can show."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from statistics import NormalDist
from typing import Any

from stayaligned.evaluation.metrics.exact import bounded_tail
from stayaligned.evaluation.metrics.paired import MeanOfPrompts, least_count


def needed_n(first: float, second: float, *, power: float = 0.8, confidence: float = 0.95) -> int:
    """Return the prompts per model that distinguish two rates, unpaired (Fleiss, without continuity correction).

    n = (z_α·√(2p̄(1-p̄)) + z_β·√(p1(1-p1) + p2(1-p2)))² / (p1 - p2)². Fewer suffice if both models answer the same
    prompts.

    Raises:
        ValueError: If the rates are equal or outside [0, 1].
    """
    if first == second or not (0 <= first <= 1 and 0 <= second <= 1):
        raise ValueError(f"expected two different rates between 0 and 1, found {first} and {second}")
    z_alpha, z_beta = NormalDist().inv_cdf((1 + confidence) / 2), NormalDist().inv_cdf(power)
    mean = (first + second) / 2
    spread = z_alpha * math.sqrt(2 * mean * (1 - mean))
    spread += z_beta * math.sqrt(first * (1 - first) + second * (1 - second))
    return math.ceil((spread / (first - second)) ** 2)


def power(first: float, second: float, n: int, *, confidence: float = 0.95) -> float:
    """Return the probability that n prompts per model distinguish two rates, unpaired: the inverse of `needed_n`."""
    if first == second:
        return 1 - confidence
    mean = (first + second) / 2
    z_alpha = NormalDist().inv_cdf((1 + confidence) / 2)
    distance = abs(first - second) * math.sqrt(n) - z_alpha * math.sqrt(2 * mean * (1 - mean))
    spread = math.sqrt(first * (1 - first) + second * (1 - second))
    return NormalDist().cdf(distance / spread) if spread > 0 else float(distance > 0)


def discordance(first: float, second: float) -> float:
    """Return the share of prompts on which two models differ if their answers are independent.

    Real models agree more often, so this is a cautious value for planning if the share is unknown.
    """
    return first * (1 - second) + second * (1 - first)


def expected_difference(
    difference: float, discordant: float, n: int, *, seeds: int = 1, seed_spread: float = 0.0
) -> MeanOfPrompts:
    """Return the expected mean difference and variances for n prompts that both models answer.

    Args:
        difference: Difference of the two rates.
        discordant: Share of prompts on which the models differ, at least `difference`.
        n: Number of prompts.
        seeds: Number of runs per model, all on the same prompts.
        seed_spread: Standard deviation, between seeds, of a seed's difference.

    Raises:
        ValueError: If `discordant` is below the difference or above 1.
    """
    if not abs(difference) <= discordant <= 1:
        raise ValueError(f"a difference of {difference:g} needs that share of discordant prompts, not {discordant:g}")
    return MeanOfPrompts(
        value=difference,
        n_prompts=n,
        prompt_variance=discordant - difference**2,
        n_seeds=seeds,
        seed_variance=seed_spread**2,
        step=1 / (n * seeds),
    )


def paired_power(
    difference: float,
    discordant: float,
    n: int,
    *,
    limit: float = 0.0,
    confidence: float = 0.95,
    seeds: int = 1,
    seed_spread: float = 0.0,
    exact: bool = False,
) -> float:
    """Return the probability that the interval of a difference on the same n prompts lies beyond `limit`.

    For one seed it is a sum over the numbers of prompts on which the models differ; from two thousand such prompts on,
    and for several seeds, it is the normal approximation. `exact` as for `mean_of_prompts`.
    """
    sign = 1 if difference >= limit else -1
    expected = expected_difference(sign * difference, discordant, n, seeds=seeds, seed_spread=seed_spread)
    if seeds > 1 or n * discordant > _MOST_COUNTED:
        return expected.chance_above(sign * limit, confidence)
    if exact:
        return _count_exactly_above(sign * difference, discordant, n, sign * limit, (1 - confidence) / 2)
    return _count_above(sign * difference, discordant, n, sign * limit, confidence)


_MOST_COUNTED = 2000


def _count_above(difference: float, discordant: float, n: int, limit: float, confidence: float) -> float:
    """Return the exact probability that the interval of `mean_of_prompts` for one seed lies above `limit`."""
    import numpy as np
    from scipy.special import gammaln, stdtrit, xlogy

    shares = ((discordant + difference) / 2, (discordant - difference) / 2)
    counts: list[Any] = []
    for share in shares:
        reach = 8 * math.sqrt(n * share * (1 - share)) + 10  # what lies beyond has a probability below 1e-12
        counts.append(np.arange(max(0, int(n * share - reach)), min(n, math.ceil(n * share + reach)) + 1))
    more, less = (grid.ravel() for grid in np.meshgrid(*counts, indexing="ij"))
    more, less = more[more + less <= n], less[more + less <= n]
    rest = n - more - less
    logs = gammaln(n + 1) - gammaln(more + 1) - gammaln(less + 1) - gammaln(rest + 1)
    logs += xlogy(more, shares[0]) + xlogy(less, shares[1]) + xlogy(rest, max(0.0, 1 - discordant))
    mean = (more - less) / n
    center = mean * n / (n + 2)
    squares = more + less - n * mean**2 + n * (mean - center) ** 2 + (1 - center) ** 2 + (1 + center) ** 2
    half = stdtrit(n + 1, (1 + confidence) / 2) * np.sqrt(squares / ((n + 2) * (n + 1))) + 0.5 / n
    return min(1.0, float(np.exp(logs)[center - half > limit].sum()))


def _count_exactly_above(difference: float, discordant: float, n: int, limit: float, alpha: float) -> float:
    """Return the probability that `bounded_tail` rejects "the mean is not above `limit`", for one seed."""
    import numpy as np
    from scipy.special import bdtrc, gammaln, xlog1py, xlogy

    share, opposite = (discordant + difference) / 2, (discordant - difference) / 2
    reach = 5 * math.sqrt(n * opposite * (1 - opposite)) + 5  # what lies beyond has a probability below 1e-5
    less = np.arange(max(0, int(n * opposite - reach)), min(n, math.ceil(n * opposite + reach)) + 1)

    def enough(more: Any) -> Any:
        counts = np.stack([less, n - less - more, more], axis=-1)
        return bounded_tail((-1.0, 0.0, 1.0), counts, limit, end=-1.0) <= alpha

    # The greatest number that is too few, and one that is enough, near that of a normal distribution if possible.
    rough = less + n * limit + NormalDist().inv_cdf(1 - alpha) * np.sqrt(np.maximum(0, 2 * less + n * limit))
    low = np.clip(rough.astype(int) - 4, -1, n - less)
    high = np.clip(low + 16, 0, n - less)
    low = np.where((low >= 0) & enough(np.maximum(low, 0)), -1, low)
    high = np.where(enough(high), high, n - less)
    while (high - low > 1).any():
        more = (low + high) // 2
        found = enough(more)
        low, high = np.where(found, low, more), np.where(found, more, high)
    logs = gammaln(n + 1) - gammaln(less + 1) - gammaln(n - less + 1)
    logs += xlogy(less, opposite) + xlog1py(n - less, -opposite)
    rest = bdtrc(high - 1, n - less, min(1.0, share / (1 - opposite)))
    return min(1.0, float((np.exp(logs) * np.where(high > 0, rest, 1.0)).sum()))


def paired_needed_n(
    difference: float,
    discordant: float,
    *,
    limit: float = 0.0,
    power: float = 0.8,
    confidence: float = 0.95,
    seeds: int = 1,
    seed_spread: float = 0.0,
    exact: bool = False,
) -> int | None:
    """Return the prompts, answered by both models, for which `paired_power` reaches `power`; None if none suffice.

    Larger numbers reach it too, although probabilities of counts do not rise evenly with n. With `difference` = 0 and a
    margin as `limit`: the prompts that show that an unchanged model is not worse by it.
    """

    def enough(n: int) -> bool:
        options: dict[str, Any] = {"seeds": seeds, "seed_spread": seed_spread, "exact": exact}
        return paired_power(difference, discordant, n, limit=limit, confidence=confidence, **options) >= power

    if difference == limit:
        return None
    found = least_count(enough)
    few = found is not None and seeds == 1 and found * discordant <= _MOST_UNEVEN
    return _lasting_count(enough, found) if few else found


_MOST_UNEVEN = 100
"""From this number of events on, the probability of a count rises evenly enough with the number of prompts."""


def _lasting_count(enough: Callable[[int], bool], found: int | None) -> int | None:
    """Return the least number from `found` on after which all numbers, up to a quarter more, are enough."""
    if found is None:
        return None
    return next((n + 1 for n in range(found * 5 // 4, found, -1) if not enough(n)), found)


def ceiling_power(rate: float, ceiling: float, n: int, *, confidence: float = 0.95) -> float:
    """Return the probability that Clopper and Pearson's interval of a rate lies on the rate's side of `ceiling`."""
    from scipy.special import bdtr, bdtrik

    if rate > ceiling:
        return ceiling_power(1 - rate, 1 - ceiling, n, confidence=confidence)
    tail = (1 - confidence) / 2
    # The upper bound of k hits is below the ceiling exactly if P(X ≤ k) at the ceiling is below the tail.
    if bdtr(0, n, ceiling) >= tail:
        return 0.0
    most = int(bdtrik(tail, n, ceiling)) + 1
    while bdtr(most, n, ceiling) >= tail:
        most -= 1
    return float(bdtr(most, n, rate))


def ceiling_needed_n(rate: float, ceiling: float, *, power: float = 0.8, confidence: float = 0.95) -> int | None:
    """Return the prompts for which `ceiling_power` reaches `power`; None at the ceiling, where none suffice."""
    if rate == ceiling:
        return None

    def enough(n: int) -> bool:
        return ceiling_power(rate, ceiling, n, confidence=confidence) >= power

    return _lasting_count(enough, least_count(enough))


def smallest_limit(chance: Callable[[float], float], *, power: float = 0.9) -> float | None:
    """Return the smallest limit, to a hundredth of a point, that is decided with probability `power`; None if none is.

    Args:
        chance: Maps a limit to the probability that a model within it passes, which grows with the limit.
        power: Probability to reach.
    """
    steps = range(1, 10_000)
    index = bisect_left(steps, True, key=lambda step: chance(step / 10_000) >= power)
    return steps[index] / 10_000 if index < len(steps) else None


def detectable_difference(rate: float, chance: Callable[[float], float], *, power: float = 0.8) -> float | None:
    """Return the smallest rise of a rate that is detected with probability `power`; None if a rise to 1 is not.

    Args:
        rate: Rate of the baseline model.
        chance: Maps a rise to the probability that it is detected, which grows with the rise.
        power: Probability to reach.
    """
    low, high = 0.0, 1.0 - rate
    if high <= 0 or chance(high) < power:
        return None
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (low, middle) if chance(middle) >= power else (middle, high)
    return high
