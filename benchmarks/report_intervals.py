"""Compute the coverage of the report's intervals over seeds and prompts, and how often it claims less harm wrongly.

    python benchmarks/report_intervals.py

Prints the tables of docs/concepts/statistics.md. Completions are drawn from a logistic model: a prompt's and a
seed's own level add up, and each completion is harmful with the resulting probability. What the intervals should cover
is the mean over all prompts and all seeds. Every interval and p-value is that of `MeanOfPrompts`, which is checked
first.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from scipy.special import betaincinv, expit, stdtr, stdtrit

from stayaligned.evaluation.metrics import holm, mean_of_prompts

Array = np.ndarray
DRAWS = 4000
SEEDS, PROMPTS = (2, 3, 5, 10), (20, 50, 200)


class Kind(NamedTuple):
    """A kind of arm: the levels are on the logistic scale, where 0 is a rate of one half."""

    name: str
    level: float
    by_prompt: float
    """Standard deviation of the prompts' levels."""
    by_seed: float
    """Standard deviation of the seeds' levels."""


KINDS = (
    Kind("harm near 0, only chance", -5.5, 0.0, 0.0),
    Kind("harm about 5 %, prompts differ", -4.0, 1.5, 0.2),
    Kind("harm about 10 %, seeds differ too", -3.0, 1.5, 0.7),
    Kind("harm 50 %, prompts decide", 0.0, 4.0, 0.2),
    Kind("harm 50 %, seeds matter most", 0.0, 1.0, 1.0),
    Kind("harm about 97 %", 4.5, 1.5, 0.3),
)


def main() -> None:
    """Print every table."""
    started = time.monotonic()
    check_arrays()
    rng = np.random.default_rng(0)
    for title, rows in (
        ("Mean of an arm, the seeds share the prompts", means(rng)),
        ("Mean of an arm, each seed has its own prompts", own_prompts(rng)),
        ("Rate of a category", categories(rng)),
        ("Difference of two arms", differences(rng)),
        ("Wrong claims", claims(rng)),
    ):
        print(f"\n### {title}\n")
        for index, row in enumerate(rows):
            print("| " + " | ".join(row) + " |")
            if index == 0:
                print("|---" * len(row) + "|")
            sys.stdout.flush()
    print(f"\n{time.monotonic() - started:.0f} s; sampling error ± {2 * (0.95 * 0.05 / DRAWS) ** 0.5:.3f}")


# ---- drawing ---------------------------------------------------------------------------------------------------------


def draw(rng: np.random.Generator, kind: Kind, k: int, n: int, *, shared: bool = True, draws: int = DRAWS) -> Array:
    """Draw completions of one arm, shaped (draws, seeds, prompts): 1 is harmful."""
    prompts = rng.normal(size=(draws, 1 if shared else k, n)) * kind.by_prompt
    seeds = rng.normal(size=(draws, k, 1)) * kind.by_seed
    return (rng.random((draws, k, n)) < expit(kind.level + prompts + seeds)).astype(float)


def expected(rng: np.random.Generator, kind: Kind) -> float:
    """Compute the mean over all prompts and seeds."""
    spread = (kind.by_prompt**2 + kind.by_seed**2) ** 0.5
    return float(expit(kind.level + rng.normal(size=2_000_000) * spread).mean())


# ---- the intervals ---------------------------------------------------------------------------------------------------


def crossed(table: Array, ends: tuple[float, float], *, shared: bool = True) -> tuple[Array, Array, Array]:
    """Return lower and upper bounds and two-sided p-values of `MeanOfPrompts`, for arrays (draws, seeds, prompts)."""
    _, k, n = table.shape
    if not shared:
        n = k * n
    mean = table.mean(axis=(1, 2))
    values = table.mean(axis=1) if shared else table.reshape(len(table), n)
    center = (mean * n + sum(ends)) / (n + 2)
    squares = ((values - mean[:, None]) ** 2).sum(axis=1) + n * (mean - center) ** 2
    squares += sum((end - center) ** 2 for end in ends)
    prompts, between = squares / ((n + 2) * (n + 1)), table.mean(axis=2).var(axis=1, ddof=1) / k
    both = prompts + between
    with np.errstate(divide="ignore"):
        free = both**2 / (between**2 / (k - 1) + prompts**2 / (n + 1))
    errors = [
        (between, np.full(len(table), k - 1.0)),
        (both, free) if shared else (prompts, np.full(len(table), n + 1.0)),
    ]
    half = np.max([stdtrit(f, 0.975) * np.sqrt(error) for error, f in errors], axis=0) + 0.5 / table[0].size
    distance = np.abs(center) - 0.5 / table[0].size
    with np.errstate(divide="ignore", invalid="ignore"):
        tails = [np.where(error > 0, stdtr(f, -distance / np.sqrt(error)), distance <= 0) for error, f in errors]
    return center - half, center + half, np.minimum(1, 2 * np.max(tails, axis=0))


def over_seeds(table: Array) -> tuple[Array, Array]:
    """Return Student's interval of the seeds' means, as if the prompts were all there are."""
    k = table.shape[1]
    mean = table.mean(axis=(1, 2))
    half = stdtrit(k - 1, 0.975) * table.mean(axis=2).std(axis=1, ddof=1) / k**0.5
    return mean - half, mean + half


def pooled(table: Array) -> tuple[Array, Array]:
    """Return Clopper and Pearson's interval of all completions, as if they were unrelated."""
    n = table[0].size
    hits = table.sum(axis=(1, 2))
    low = np.where(hits > 0, betaincinv(np.maximum(hits, 1), n - hits + 1, 0.025), 0.0)
    high = np.where(hits < n, betaincinv(hits + 1, np.maximum(n - hits, 1), 0.975), 1.0)
    return low, high


def check_arrays() -> None:
    """Check that the array functions equal the class that the report uses."""
    rng = np.random.default_rng(1)
    for ends, shared in (((0.0, 1.0), True), ((0.0, 1.0), False), ((-1.0, 1.0), True)):
        table = rng.integers(int(ends[0]), 2, size=(1, 3, 40)).astype(float)
        rows = {s: {(i if shared else (s, i)): v for i, v in enumerate(row)} for s, row in enumerate(table[0].tolist())}
        found = mean_of_prompts(rows, ends=ends)
        low, high, p_value = crossed(table, ends, shared=shared)
        assert np.allclose((low[0], high[0]), (found.center - found.half_width(), found.center + found.half_width()))
        assert np.isclose(p_value[0], found.p_value())


def held(bounds: tuple[Array, ...], truth: float) -> float:
    """Return the share of intervals that contain the truth, to rounding."""
    return float(((bounds[0] <= truth + 1e-12) & (truth - 1e-12 <= bounds[1])).mean())


# ---- tables ----------------------------------------------------------------------------------------------------------


def means(rng: np.random.Generator) -> Iterator[list[str]]:
    """Yield the coverage of an arm's mean."""
    yield ["completions", "rate", "seeds", *(f"{n} prompts: used, t over seeds" for n in PROMPTS)]
    for kind in KINDS:
        truth = expected(rng, kind)
        for k in SEEDS:
            tables = [draw(rng, kind, k, n) for n in PROMPTS]
            cells = [f"**{held(crossed(t, (0, 1)), truth):.3f}**, {held(over_seeds(t), truth):.3f}" for t in tables]
            yield [kind.name, f"{truth:.1%}", str(k), *cells]


def own_prompts(rng: np.random.Generator) -> Iterator[list[str]]:
    """Yield the coverage of an arm's mean where no prompt is shared, as in the demo."""
    yield ["completions", "rate", "seeds", *(f"{n} prompts: used, t over seeds" for n in PROMPTS)]
    for kind in KINDS:
        truth = expected(rng, kind)
        for k in SEEDS:
            tables = [draw(rng, kind, k, n, shared=False) for n in PROMPTS]
            cells = [
                f"**{held(crossed(t, (0, 1), shared=False), truth):.3f}**, {held(over_seeds(t), truth):.3f}"
                for t in tables
            ]
            yield [kind.name, f"{truth:.1%}", str(k), *cells]


def categories(rng: np.random.Generator) -> Iterator[list[str]]:
    """Yield the coverage of the rate of a category, of few prompts."""
    sizes = (3, 5, 10, 20)
    yield ["completions", "seeds", *(f"{n} prompts: used, pooled counts" for n in sizes)]
    for kind in KINDS:
        truth = expected(rng, kind)
        for k in (2, 3, 5):
            tables = [draw(rng, kind, k, n) for n in sizes]
            cells = [f"**{held(crossed(t, (0, 1)), truth):.3f}**, {held(pooled(t), truth):.3f}" for t in tables]
            yield [kind.name, str(k), *cells]


def differences(rng: np.random.Generator) -> Iterator[list[str]]:
    """Yield the coverage of the difference of two arms on the same prompts."""
    yield ["arm and reference arm", "change", "seeds", *(f"{n} prompts: used, t over seeds" for n in PROMPTS)]
    for name, one, other in (
        ("both near 0", KINDS[0], KINDS[0]),
        ("97 % to 97 %, prompts differ", KINDS[5], KINDS[5]),
        ("97 % to 5 %", KINDS[1], KINDS[5]),
        ("97 % to 50 %, seeds matter most", KINDS[4], KINDS[5]),
        ("50 % to 10 %, prompts decide", KINDS[2], KINDS[3]),
    ):
        truth = expected(rng, one) - expected(rng, other) if one is not other else 0.0
        for k in SEEDS:
            tables = [change(rng, one, other, k, n) for n in PROMPTS]
            cells = [f"**{held(crossed(t, (-1, 1)), truth):.3f}**, {held(over_seeds(t), truth):.3f}" for t in tables]
            yield [name, f"{100 * truth:+.1f}", str(k), *cells]


def change(rng: np.random.Generator, one: Kind, other: Kind, k: int, n: int, draws: int = DRAWS) -> Array:
    """Draw differences of two arms on the same prompts; prompts that are hard for one are hard for the other."""
    prompts, found = rng.normal(size=(draws, 1, n)), []
    for kind in (one, other):
        latent = kind.level + prompts * kind.by_prompt + rng.normal(size=(draws, k, 1)) * kind.by_seed
        found.append((rng.random((draws, k, n)) < expit(latent)).astype(float))
    return found[0] - found[1]


def claims(rng: np.random.Generator) -> Iterator[list[str]]:
    """Yield how often a report claims less harm of some arm although no arm differs from the reference arm."""
    yield ["completions", "competing arms", "seeds", "some arm is claimed to have less harm", "without the correction"]
    for kind in (KINDS[2], KINDS[4], KINDS[5]):
        for n_arms in (1, 6, 12):
            for k in (3, 5):
                corrected = plain = 0
                for found in false_claims(rng, kind, n_arms, k, 100, 1000):
                    corrected += found[0]
                    plain += found[1]
                yield [kind.name, str(n_arms), str(k), f"{corrected / 1000:.1%}", f"{plain / 1000:.1%}"]


def false_claims(
    rng: np.random.Generator, kind: Kind, n_arms: int, k: int, n: int, draws: int
) -> Iterator[tuple[bool, bool]]:
    """Yield whether some arm of one report is claimed to have less harm, with and without Holm's correction."""
    prompts = rng.normal(size=(draws, 1, 1, n)) * kind.by_prompt
    seeds = rng.normal(size=(draws, n_arms + 1, k, 1)) * kind.by_seed
    arms = (rng.random((draws, n_arms + 1, k, n)) < expit(kind.level + prompts + seeds)).astype(float)
    lower, p_values = [], []
    for i in range(n_arms):
        table = arms[:, i + 1] - arms[:, 0]
        lower.append(table.mean(axis=(1, 2)) < 0)
        p_values.append(crossed(table, (-1, 1))[2])
    for low, row in zip(np.array(lower).T, np.array(p_values).T.tolist(), strict=True):
        yield any(low & (np.array(holm(row)) < 0.05)), any(low & (np.array(row) < 0.05))


if __name__ == "__main__":
    main()
