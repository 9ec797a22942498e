"""All outcomes of two models on n prompts, with their intervals, for exact coverage without sampling."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy
from scipy.special import gammaln, xlogy

from stayaligned.evaluation.metrics import MeanOfPrompts


@dataclass(frozen=True)
class PairedOutcomes:
    """The interval of the difference for every (prompts that only the first did, prompts that only the second did)."""

    n: int
    first: numpy.ndarray
    second: numpy.ndarray
    low: numpy.ndarray
    high: numpy.ndarray

    def probability(self, p10: float, p01: float) -> numpy.ndarray:
        """Return the probability of each outcome under the multinomial distribution."""
        rest = self.n - self.first - self.second
        logs = gammaln(self.n + 1) - gammaln(self.first + 1) - gammaln(self.second + 1) - gammaln(rest + 1)
        logs += xlogy(self.first, p10) + xlogy(self.second, p01) + xlogy(rest, 1 - p10 - p01)
        return numpy.exp(logs)


@cache
def paired_outcomes(n: int, confidence: float = 0.95) -> PairedOutcomes:
    """Return all outcomes of n prompts."""
    pairs = [(b, c) for b in range(n + 1) for c in range(n + 1 - b)]
    bounds = []
    for b, c in pairs:
        mean = (b - c) / n
        found = MeanOfPrompts(mean, n, (b + c - n * mean**2) / (n - 1), step=1 / n)
        bounds.append(found.interval(confidence))
    first, second = numpy.array(pairs).T
    low, high = numpy.array(bounds).T
    return PairedOutcomes(n, first, second, low, high)
