"""Boundaries of a gate that looks at a growing evaluation several times (group-sequential tests)."""

from __future__ import annotations

import math
import re
from functools import lru_cache

from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import Record

MOST_LOOKS = 5
"""With more looks, the first ones decide nothing, and other prompts at each look would cost too much of the level."""


class Look(Record):
    """One of several planned looks, at equal steps of the number of prompts."""

    number: int
    """Number of this look, from 1."""
    planned: int
    """Number of looks that were planned."""

    def __str__(self) -> str:
        return f"{self.number}/{self.planned}"

    @property
    def last(self) -> Look:
        """The last of the planned looks."""
        return Look(number=self.planned, planned=self.planned)


def parse_look(text: str) -> Look:
    """Parse `2/4`, the second of four planned looks.

    Raises:
        StayalignedError: If it is not two numbers K/N with 1 ≤ K ≤ N and 2 ≤ N ≤ 5.
    """
    found = re.fullmatch(r"\s*(\d{1,3})\s*/\s*(\d{1,3})\s*", text, re.ASCII)
    number, planned = (int(found[1]), int(found[2])) if found else (0, 0)
    if not (2 <= planned <= MOST_LOOKS and 1 <= number <= planned):
        raise StayalignedError(
            f"--look {text}: expected K/N, the K-th of N planned looks, with N from 2 to {MOST_LOOKS}",
            hint="For example --look 2/4. Decide on N before the first look; without --look, look once.",
        )
    return Look(number=number, planned=planned)


def level_at(look: Look, alpha: float) -> float:
    """Return the one-sided level of the test at a look, so that all looks together err in at most `alpha`.

    The error that the first k of N looks may spend is 2 - 2Φ(z_{α/2} / √(k/N)) (Lan and DeMets, Biometrika 70:659,
    1983), whose boundaries are close to those of O'Brien and Fleming (Biometrics 35:549, 1979): almost nothing is spent
    early, so that the last look is nearly as powerful as a single one. Opposite boundaries are not binding: going on
    after a look that decided does not raise the error.
    """
    return _levels(look.planned, alpha)[look.number - 1]


@lru_cache(maxsize=1024)
def _levels(planned: int, alpha: float) -> tuple[float, ...]:
    """Compute the level at every look, by the recursion of Armitage, McPherson and Rowe (JRSS A 132:235, 1969).

    The sum after k looks is a walk with standard normal steps. Its density, where no boundary was crossed, is kept at
    the nodes of a Gauss-Legendre quadrature.
    """
    import numpy as np
    from numpy.polynomial.legendre import leggauss
    from scipy.optimize import root_scalar
    from scipy.special import ndtr, ndtri

    nodes, weights = leggauss(80)
    spent = [2 * float(ndtr(ndtri(alpha / 2) / math.sqrt(k / planned))) for k in range(1, planned + 1)]
    steps = np.zeros(1)  # where the walk may be before this look, with its probabilities
    masses = np.ones(1)
    levels: list[float] = []
    for k, allowed in enumerate(np.diff(spent, prepend=0.0), 1):

        def excess(
            bound: float, steps: np.ndarray = steps, masses: np.ndarray = masses, allowed: float = float(allowed)
        ) -> float:
            return float(masses @ ndtr(steps - bound)) - allowed

        high = 10 * math.sqrt(k)
        bound = high if excess(high) >= 0 else float(root_scalar(excess, bracket=(-high, high)).root)
        levels.append(float(ndtr(-bound / math.sqrt(k))))
        low = -9 * math.sqrt(k)
        at = low + (bound - low) * (nodes + 1) / 2
        density = np.exp(-((at[:, None] - steps) ** 2) / 2) @ masses / math.sqrt(2 * math.pi)
        steps, masses = at, density * weights * (bound - low) / 2
    return tuple(levels)


def repeated_p(p_value: float, look: Look | None) -> float:
    """Return the least `alpha` at which a p-value rejects at a look; the p-value itself without planned looks.

    It may be corrected for several criteria as any p-value (Ye and others, Statistics in Medicine 32:1112, 2013).
    """
    from scipy.optimize import root_scalar

    if look is None or p_value == 0:
        return p_value
    if p_value > 0.5:
        return 1.0
    least, most = 1e-12, 0.999
    if level_at(look, least) >= p_value:
        return least
    if level_at(look, most) < p_value:
        return 1.0
    found = root_scalar(
        lambda log: math.log(level_at(look, math.exp(log)) / p_value), bracket=(math.log(least), math.log(most))
    )
    return min(1.0, math.exp(found.root))
