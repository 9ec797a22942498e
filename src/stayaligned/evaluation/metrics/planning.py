"""How many prompts a comparison needs, and what a number of prompts can show."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist

from stayaligned.evaluation.metrics.paired import MeanOfPrompts, least_count


def needed_n(first: float, second: float, *, power: float = 0.8, confidence: float = 0.95) -> int:
    """Prompts per model after which two rates this far apart are told apart, unpaired (Fleiss, no continuity).

    n = (z_α·√(2p̄(1-p̄)) + z_β·√(p1(1-p1) + p2(1-p2)))² / (p1 - p2)²; on the same prompts fewer suffice.

    Raises:
        ValueError: if the rates are equal or outside [0, 1].
    """
    if first == second or not (0 <= first <= 1 and 0 <= second <= 1):
        raise ValueError(f"no two different rates: {first} and {second}")
    z_alpha, z_beta = NormalDist().inv_cdf((1 + confidence) / 2), NormalDist().inv_cdf(power)
    mean = (first + second) / 2
    spread = z_alpha * math.sqrt(2 * mean * (1 - mean))
    spread += z_beta * math.sqrt(first * (1 - first) + second * (1 - second))
    return math.ceil((spread / (first - second)) ** 2)


def power(first: float, second: float, n: int, *, confidence: float = 0.95) -> float:
    """The probability that two rates are told apart with n prompts per model, unpaired: `needed_n` turned round."""
    if first == second:
        return 1 - confidence
    mean = (first + second) / 2
    z_alpha = NormalDist().inv_cdf((1 + confidence) / 2)
    distance = abs(first - second) * math.sqrt(n) - z_alpha * math.sqrt(2 * mean * (1 - mean))
    spread = math.sqrt(first * (1 - first) + second * (1 - second))
    return NormalDist().cdf(distance / spread) if spread > 0 else float(distance > 0)


def discordance(first: float, second: float) -> float:
    """The share of prompts on which two models differ, if their answers to a prompt had nothing to do with each other.

    Real pairs agree more often than that, so it is cautious to plan with it where the share is unknown.
    """
    return first * (1 - second) + second * (1 - first)


def expected_difference(
    difference: float, discordant: float, n: int, *, seeds: int = 1, seed_spread: float = 0.0
) -> MeanOfPrompts:
    """What n prompts, answered by both models, are expected to show of a difference.

    Args:
        difference: of the two rates.
        discordant: the share of prompts on which the models differ, at least the difference.
        n: prompts.
        seeds: runs per model, all on the same prompts.
        seed_spread: the standard deviation, between seeds, of a seed's difference.

    Raises:
        ValueError: if fewer prompts differ than the difference needs, or a number is out of its range.
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
) -> float:
    """The probability that the interval of a difference on the same n prompts lies beyond `limit`, on its side."""
    sign = 1 if difference >= limit else -1
    expected = expected_difference(sign * difference, discordant, n, seeds=seeds, seed_spread=seed_spread)
    return expected.chance_above(sign * limit, confidence)


def paired_needed_n(
    difference: float,
    discordant: float,
    *,
    limit: float = 0.0,
    power: float = 0.8,
    confidence: float = 0.95,
    seeds: int = 1,
    seed_spread: float = 0.0,
) -> int | None:
    """Prompts, answered by both models, from which on `paired_power` reaches `power`; None if no number does.

    With `difference` = 0 and `limit` a margin: what it takes to show that an unchanged model is not worse by it.
    """

    def enough(n: int) -> bool:
        reached = paired_power(
            difference, discordant, n, limit=limit, confidence=confidence, seeds=seeds, seed_spread=seed_spread
        )
        return reached >= power

    return None if difference == limit else least_count(enough)


def detectable_difference(rate: float, chance: Callable[[float], float], *, power: float = 0.8) -> float | None:
    """The least rise of a rate that is seen with probability `power`; None if not even a rise to 1 is.

    Args:
        rate: of the model that is compared with.
        chance: the probability that a rise is seen, which grows with it.
        power: the probability to reach.
    """
    low, high = 0.0, 1.0 - rate
    if high <= 0 or chance(high) < power:
        return None
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (low, middle) if chance(middle) >= power else (middle, high)
    return high
