"""The error rates of the gate's declared modes, for `gate_statistics.py`: one-sided tests, planned looks, an anchor."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from scipy.special import stdtrit
from scipy.stats import binom, norm

from gate_statistics import LIMIT, own_parts, p_above
from stayaligned.evaluation.metrics import holm, mean_of_prompts
from stayaligned.evaluation.metrics.exact import bounded_tail
from stayaligned.gate.looks import Look, level_at

Array = np.ndarray
Rule = Callable[[int, Array, Array, float], Array]
"""Whether counts (n, worse, better) show that the candidate is not worse by the limit."""

SHARES = (0.0, 0.0001, 0.001, 0.004, 0.01, 0.03, 0.1)
"""Shares of prompts on which the candidate is better."""


def student(level: float) -> Rule:
    """Return the rule of the two-sided interval, at a one-sided level."""

    def rule(n: int, worse: Array, better: Array, limit: float) -> Array:
        center, error = own_parts(n, worse, better)
        return center + stdtrit(n + 1, 1 - level) * error + 0.5 / n < limit

    return rule


def dirichlet(level: float) -> Rule:
    """Return the rule of the one-sided mode."""

    def rule(n: int, worse: Array, better: Array, limit: float) -> Array:
        counts = np.stack([worse, n - worse - better, better], axis=-1)
        return bounded_tail((1.0, 0.0, -1.0), counts, limit, end=1.0) <= level

    return rule


def tango(level: float) -> Rule:
    """Return the rule of Tango's score test (Statistics in Medicine 17:891, 1998)."""

    def rule(n: int, worse: Array, better: Array, limit: float) -> Array:
        b = -worse - better + (2 * n - worse + better) * limit
        share = (np.sqrt(b * b + 8 * n * better * limit * (1 - limit)) - b) / (4 * n)
        return (worse - better - n * limit) / np.sqrt(n * (2 * share + limit * (1 - limit))) < norm.ppf(level)

    return rule


def most_worse(rule: Rule, n: int, limit: float, better: Array) -> Array:
    """Return, for each number of better prompts, the greatest number of worse prompts that passes; -1 if none does."""
    low, high = np.full(len(better), -1), np.minimum(n - better, better + int(n * abs(limit)) + 60) + 1
    while (high - low > 1).any():
        middle = (low + high) // 2
        passes = rule(n, middle, better, limit)
        low, high = np.where(passes, middle, low), np.where(passes, high, middle)
    return np.minimum(low, n - better)


def passing(rule: Rule, n: int, limit: float, worse: float, better: float) -> float:
    """Compute the probability of a pass exactly."""
    counts = np.arange(int(binom.ppf(1 - 1e-9, n, better)) + 1)
    most = most_worse(rule, n, limit, counts)
    inside = np.where(most >= 0, binom.cdf(most, n - counts, worse / (1 - better)), 0.0)
    return float((binom.pmf(counts, n, better) * inside).sum())


def failing(rule: Rule, n: int, limit: float, worse: float, better: float) -> float:
    """Compute the probability of a fail exactly: that of a pass if both models are exchanged."""
    counts = np.arange(int(binom.ppf(1 - 1e-9, n, worse)) + 1)
    most = most_worse(rule, n, -limit, counts)
    inside = np.where(most >= 0, binom.cdf(most, n - counts, better / (1 - worse)), 0.0)
    return float((binom.pmf(counts, n, worse) * inside).sum())


def one_sided() -> Iterator[list[str]]:
    """Yield the largest shares of passes and fails of a candidate that is worse by exactly the limit."""
    limits = (0.01, 0.02, 0.05, 0.1)
    yield ["test at 5 %", "error", *(f"limit {limit:.0%}" for limit in limits)]
    numbers = [*range(50, 200, 15), *range(200, 1001, 61), 149, 299, 773, 782, 945, 966]
    for name, rule in (
        ("Dirichlet bounds (used)", dirichlet(0.05)),
        ("Student's with both ends added", student(0.05)),
        ("Tango's score", tango(0.05)),
    ):
        kinds = [("false passes", passing), ("false fails", failing)]
        for error, find in kinds[: 1 if name == "Tango's score" else 2]:
            row = [name, error]
            for limit in limits:
                found = [(find(rule, n, limit, limit + share, share), n, share) for n in numbers for share in SHARES]
                row.append("{:.2%} (n = {}, better on {:.2%})".format(*max(found)))
            yield row


def needed(rule: Rule, limit: float, share: float, power: float = 0.8) -> int:
    """Return the prompts with which an unchanged model passes."""
    high = 16
    while passing(rule, high, limit, share / 2, share / 2) < power:
        high = high * 5 // 4
    low = high * 4 // 5 - 1
    while high - low > 1:
        middle = (low + high) // 2
        enough = passing(rule, middle, limit, share / 2, share / 2) >= power
        low, high = (low, middle) if enough else (middle, high)
    return high


def saved() -> Iterator[list[str]]:
    """Yield the prompts with which an unchanged model passes in four cases of five."""
    yield ["limit", "models differ on", "two-sided 95 %", "one-sided 5 % (used)", "fewer", "Tango's score"]
    for limit, shares in ((0.01, (0.0, 0.01, 0.02)), (0.02, (0.0, 0.02, 0.05, 0.1)), (0.05, (0.0, 0.02, 0.05, 0.1))):
        for share in shares:
            both, one, score = (needed(rule, limit, share) for rule in (student(0.025), dirichlet(0.05), tango(0.05)))
            yield [f"{limit:.0%}", f"{share:.0%}", f"{both:,}", f"{one:,}", f"{1 - one / both:.0%}", f"{score:,}"]


def graded_and_seeds(rng: np.random.Generator, repeats: int = 1000) -> Iterator[list[str]]:
    """Yield the share of runs in which the one-sided bound excludes the truth, for scores and for several seeds."""
    yield ["differences", "seeds", "prompts", "false passes", "false fails", f"± ({repeats} draws)"]
    kinds: dict[str, Callable[[tuple[int, ...]], Array]] = {
        "5 % rise by up to 1": lambda size: (rng.random(size) < 0.05) * rng.random(size),
        "1 % rise by quarters": lambda size: (rng.random(size) < 0.01) * rng.choice([0.25, 0.5, 0.75, 1.0], size),
        "every score moves (beta)": lambda size: rng.beta(2, 3, size) - rng.beta(2, 4, size),
        "2 % worse, the same under every seed": lambda size: np.broadcast_to(
            rng.random((size[0], 1, size[2])) < 0.02, size
        ).astype(float),
        "4 % worse, 2 % better, by chance": lambda size: rng.choice([1.0, -1.0, 0.0], size, p=[0.04, 0.02, 0.94]),
        "2 % worse, and seeds differ by a point": lambda size: (
            rng.random(size) < np.clip(0.02 + 0.01 * rng.normal(size=(*size[:2], 1)), 0, 0.04)
        ).astype(float),
    }
    truths = (0.025, 0.00625, 2 / 5 - 1 / 3, 0.02, 0.02, 0.02)
    for (name, draw), truth in zip(kinds.items(), truths, strict=True):
        several = name.startswith(("2 %", "4 %"))
        for n in (100, 300):
            values = draw((repeats, 3 if several else 1, n))
            errors = np.zeros(2)
            for run in values:
                mean = mean_of_prompts({k: dict(enumerate(row.tolist())) for k, row in enumerate(run)}, exact=True)
                errors += [mean.mirrored().p_above(-truth) <= 0.05, mean.p_above(truth) <= 0.05]
            spread = 2 * (0.05 * 0.95 / repeats) ** 0.5
            yield [name, str(values.shape[1]), str(n), *(f"{x:.1%}" for x in errors / repeats), f"{spread:.1%}"]


def looks(rng: np.random.Generator, draws: int = 40_000) -> Iterator[list[str]]:
    """Yield the error over all looks, and the prompts on which an unchanged model is decided."""
    yield [
        "test",
        "looks",
        "better on",
        "prompts at the last look",
        "worse by exactly the limit: passes",
        "fails",
        "unchanged: passes",
        "prompts used on average",
    ]
    for name, alpha in (("two-sided 95 %", 0.025), ("one-sided 5 %", 0.05)):
        for share, most in ((0.0, 400), (0.01, 1000), (0.05, 2000)):
            for planned in (1, 2, 3, 5):
                make = student if planned == 1 and alpha == 0.025 else dirichlet  # without a mode, and with one
                row = [name, str(planned), f"{share:.0%}", f"{most:,}"]
                worse = _procedure(rng, draws, planned, most, (LIMIT + share, share), alpha, make)
                same = _procedure(rng, draws, planned, most, (share, share), alpha, make)
                yield [*row, f"{worse[0]:.2%}", f"{worse[1]:.2%}", f"{same[0]:.1%}", f"{same[2]:,.0f}"]


def _procedure(
    rng: np.random.Generator,
    draws: int,
    planned: int,
    most: int,
    shares: tuple[float, float],
    alpha: float,
    make: Callable[[float], Rule],
) -> tuple[float, float, float]:
    """Return the shares of passes and fails, and the mean number of prompts, of looks until one decides."""
    step = most // planned
    counts = np.zeros((draws, 2), int)
    going, passed, failed, used = np.ones(draws, bool), 0, 0, 0
    for number in range(1, planned + 1):
        counts += rng.multinomial(step, [*shares, 1 - sum(shares)], size=draws)[:, :2]
        n = number * step
        level = alpha if planned == 1 else level_at(Look(number=number, planned=planned), alpha)
        rule = make(level)
        passes = counts[:, 0] <= most_worse(rule, n, LIMIT, np.arange(counts.max() + 1))[counts[:, 1]]
        fails = counts[:, 1] <= most_worse(rule, n, -LIMIT, np.arange(counts.max() + 1))[counts[:, 0]]
        used += n * int((going & (passes | fails | (number == planned))).sum())
        passed, failed = passed + int((going & passes).sum()), failed + int((going & fails).sum())
        going &= ~(passes | fails)
    return passed / draws, failed / draws, used / draws


def anchor(rng: np.random.Generator, draws: int = 2000) -> Iterator[list[str]]:
    """Yield how often releases that each add 1.9 points pass a limit of 5 points, with and without an anchor."""
    n, limit, added, churn = 1000, 0.05, 0.019, 0.01
    yield ["release", "worse than the anchor by", "passes against its baseline", "passes both", "fails of both"]
    first = rng.random((draws, n)) < 0.05
    before = first
    for release in range(1, 7):
        now = before ^ (rng.random((draws, n)) < churn)
        rise = added + before.mean() - now.mean()
        now |= rng.random((draws, n)) < rise / (1 - now.mean())
        answers = [_answers(reference, now, limit) for reference in (before, first)]
        both = answers[0][0] & answers[1][0]
        fails = np.mean(
            [min(holm(p)) <= 0.025 for p in zip(answers[0][1].tolist(), answers[1][1].tolist(), strict=True)]
        )
        truth = (now.mean() - first.mean()) * 100
        yield [f"{release}", f"{truth:.1f} points", f"{answers[0][0].mean():.1%}", f"{both.mean():.1%}", f"{fails:.1%}"]
        before = now


def _answers(before: Array, after: Array, limit: float) -> tuple[Array, Array]:
    """Return the passes, and the p-values of fails."""
    n = before.shape[1]
    worse, better = (after & ~before).sum(axis=1), (before & ~after).sum(axis=1)
    return student(0.025)(n, worse, better, limit), p_above(n, worse, better, limit)
