"""Bounds of a mean of values on a bounded scale that hold without assuming a distribution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

_LEAST_PSEUDO, _ENOUGH = 0.75, 4
"""Number of pseudo-prompts if so many prompts speak against the end at which they are put; one if none does."""


def bounded_tail(values: Sequence[float], counts: Any, at: float, *, end: float) -> Any:
    """Return the p-value of "the mean is `at`, or nearer to `end`", for values between -1 and 1.

    It is `dirichlet_tail` with a pseudo-prompt added at `end` (Learned-Miller and Thomas, arXiv:1905.06208, who
    conjecture that it holds for every distribution; for values of 0 and 1 it is Clopper and Pearson's). The
    pseudo-prompt counts less, down to 0.75, if values of the opposite sign add up to 4 or more: for differences of -1,
    0 and 1, enumeration shows that the level is held, see docs/results/gate-modes-error-rates.md.

    Args:
        values: Different values of a prompt, shaped (m,).
        counts: Number of prompts with each value, shaped (..., m).
        at: Mean to be tested.
        end: Lowest or highest possible value.

    Returns:
        P-values, shaped (...).
    """
    import numpy as np

    found, counts = np.asarray(values, float), np.asarray(counts, float)
    if at == end:  # only if every value is this one
        return np.where((counts * (found != end)).sum(-1) > 0, 0.0, 1.0)
    opposite = (counts * np.maximum(0.0, -np.sign(end) * found)).sum(-1)
    pseudo = 1 - (1 - _LEAST_PSEUDO) * np.minimum(opposite / _ENOUGH, 1.0)
    off = np.append(found, end) - at
    return dirichlet_tail(off if end > at else -off, np.concatenate([counts, pseudo[..., None]], -1), 0.0)


@lru_cache(maxsize=4096)
def bounded_interval(
    values: tuple[float, ...], counts: tuple[int, ...], *, ends: tuple[float, float], confidence: float
) -> tuple[float, float]:
    """Return the bounds that `bounded_tail` rejects at (1 - confidence)/2 each."""
    from scipy.optimize import root_scalar

    alpha = (1 - confidence) / 2
    mean = sum(v * n for v, n in zip(values, counts, strict=True)) / sum(counts)

    def bound(end: float) -> float:
        if abs(mean - end) < 1e-12:
            return end
        found = root_scalar(
            lambda at: float(bounded_tail(values, counts, at, end=end)) - alpha, bracket=(mean, end), xtol=1e-10
        )
        return found.root

    return bound(ends[0]), bound(ends[1])


def dirichlet_tail(values: Any, counts: Any, at: float) -> Any:
    """Return P(Σ w·v > at) for weights w ~ Dirichlet(counts) of values v.

    With independent gamma variables G of these shapes it is P(Σ G·(v - at) > 0), found from their characteristic
    function along a line through the saddle point, where it does not oscillate. For counts (k + 1, n - k) of the values
    1 and 0 it is a tail of the beta distribution, and so the p-value of Clopper and Pearson.

    Args:
        values: Values, shaped (m,).
        counts: Numbers of each value, 0 or more, shaped (..., m).
        at: Point at which the tail begins.

    Returns:
        Probabilities, shaped (...).
    """
    import numpy as np

    counts = np.asarray(counts, float)
    off = np.where(counts > 0, np.asarray(values, float) - at, 0.0)
    upper = (counts * off).sum(-1) < 0  # the smaller tail is computed, so that small probabilities are exact
    off = np.where(upper[..., None], off, -off)
    most = off.max(-1)
    possible = most > 0
    most = np.where(possible, most, 1.0)
    low, high = np.zeros_like(most), 1 / most
    for _ in range(30):
        middle = (low + high) / 2
        slope = (counts * off / (1 - off * middle[..., None])).sum(-1) - 1 / middle
        low, high = np.where(slope < 0, middle, low), np.where(slope < 0, high, middle)
    saddle = (low + high) / 2
    slopes = off / (1 - off * saddle[..., None])
    curvature = (counts * slopes**2).sum(-1) + 1 / saddle**2
    # The path of steepest descent turns to the side of the heavier tail.
    turn = 2 * ((counts * slopes**3).sum(-1) - 1 / saddle**3) / curvature**1.5 / 3
    turn = np.clip(turn, -0.6, 0.6)[..., None]
    share, weights = _quadrature()
    step = 40 * share**3  # denser near the saddle point
    bend = np.sqrt(1 + step**2)
    width = 1 / np.sqrt(curvature)[..., None]
    point = saddle[..., None] + width * (1j * step + turn * (bend - 1))
    direction = width * (1j + turn * step / bend)
    logs = -(counts[..., None] * np.log(1 - off[..., None] * point[..., None, :])).sum(-2) - np.log(point)
    tail = ((np.exp(logs) * direction).imag * share**2 * weights).sum(-1) * 120 / math.pi
    tail = np.where(possible, np.clip(tail, 0, 1), 0.0)
    return np.where(upper, tail, 1 - tail)


@lru_cache
def _quadrature() -> tuple[Any, Any]:
    """Return nodes between 0 and 1, and their weights."""
    from numpy.polynomial.legendre import leggauss

    nodes, weights = leggauss(80)
    return (nodes + 1) / 2, weights / 2
