"""How many prompts a comparison needs, and what a number of prompts can show."""

from __future__ import annotations

import math
from statistics import NormalDist


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
