"""Compute the coverage of every interval and the error rates of the gate, by enumeration where possible.

    python benchmarks/gate_statistics.py

Prints the tables of docs/results/gate-error-rates.md. Where it samples, it also prints the sampling error.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from scipy.special import betaincinv, gammaln, stdtr, stdtrit, xlogy
from scipy.stats import binom, binomtest, bootstrap

from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import Outcome
from stayaligned.evaluation.metrics import (
    MeanOfPrompts,
    discordance,
    holm,
    mean_of_prompts,
    paired_needed_n,
)
from stayaligned.evaluation.results import Evidence, JudgeIdentity, JudgeReading, Provenance, Result, StoredResult
from stayaligned.gate import ComparedSide, Limits, decide

Array = np.ndarray
Bounds = tuple[Array, Array]

RATES = (0.0, 0.001, 0.01, 0.05, 0.2, 0.5)
GRID = np.unique(np.concatenate([np.linspace(0.0005, 0.03, 60), np.linspace(0.03, 0.97, 189)]))


def main() -> None:
    """Print every table."""
    import gate_labels
    import mode_statistics

    started = time.monotonic()
    rng = np.random.default_rng(0)
    for title, rows in (
        ("A rate, exactly (one run, one arm)", rates()),
        ("A paired difference, exactly: coverage, and the greater one-sided error", differences()),
        ("Graded scores: the difference on the same prompts", graded(rng)),
        ("Several seeds", seeds(rng)),
        ("The gate: one criterion, limit 2 points on the harmful score", gate(rng)),
        ("The gate: largest share of passes of a candidate that is worse by exactly the limit", false_passes()),
        ("The gate: four criteria", criteria(rng)),
        ("The gate: candidates that do not answer, and evaluations that count twice", broken(rng)),
        (
            "Non-inferiority, exactly: largest error of a candidate worse by exactly the limit",
            mode_statistics.one_sided(),
        ),
        ("Non-inferiority: prompts with which an unchanged model passes in 4 of 5 cases", mode_statistics.saved()),
        (
            "Non-inferiority: scores and several seeds, worse by exactly the limit",
            mode_statistics.graded_and_seeds(rng),
        ),
        ("Planned looks: errors over all looks, limit 2 points", mode_statistics.looks(rng)),
        ("An anchor: releases that each add 1.9 points", mode_statistics.anchor(rng)),
        *gate_labels.sections(),
    ):
        print(f"\n### {title}\n")
        for index, row in enumerate(rows):
            print("| " + " | ".join(row) + " |")
            if index == 0:
                print("|---" * len(row) + "|")
            sys.stdout.flush()
    print(f"\n{time.monotonic() - started:.0f} s")


# ---- one rate --------------------------------------------------------------------------------------------------


def exact_bounds(n: int) -> Bounds:
    """Return the Clopper-Pearson interval of every count."""
    k = np.arange(n + 1)
    low, high = np.zeros(n + 1), np.ones(n + 1)
    low[1:], high[:-1] = betaincinv(k[1:], n - k[1:] + 1, 0.025), betaincinv(k[:-1] + 1, n - k[:-1], 0.975)
    return low, high


def wilson_bounds(n: int) -> Bounds:
    """Return Wilson's interval of every count."""
    low, high = np.array([binomtest(k, n).proportion_ci(method="wilson") for k in range(n + 1)]).T
    return low, high


def rates() -> Iterator[list[str]]:
    """Yield the coverage at chosen rates and the minimum over all rates."""
    yield ["n", "interval", *(f"p = {rate:g}" for rate in RATES), "least over p", "mean width at p = 0.05"]
    for n in (30, 100, 200):
        for name, bounds in (("Clopper–Pearson (used)", exact_bounds(n)), ("Wilson", wilson_bounds(n))):
            low, high = bounds

            def held(rate: float, n: int = n, low: Array = low, high: Array = high) -> float:
                return float(binom.pmf(np.arange(n + 1), n, rate)[(low <= rate) & (rate <= high)].sum())

            width = float((binom.pmf(np.arange(n + 1), n, 0.05) * (high - low)).sum())
            # Coverage is least just outside of a bound of some interval.
            ends = np.concatenate([low, high])
            least = min(held(rate) for rate in (*RATES, *GRID, *np.clip([ends - 1e-9, ends + 1e-9], 0, 1).ravel()))
            yield [str(n), name, *(f"{held(rate):.3f}" for rate in RATES), f"**{least:.3f}**", f"{width:.3f}"]


# ---- a paired difference -----------------------------------------------------------------------------------------


def cells(n: int) -> tuple[Array, Array]:
    """Return every pair of discordant counts."""
    first, second = np.meshgrid(np.arange(n + 1), np.arange(n + 1), indexing="ij")
    inside = first + second <= n
    return first[inside], second[inside]


def mass(n: int, first: Array, second: Array, p10: float, p01: float) -> Array:
    """Return the multinomial probabilities of pairs of discordant counts."""
    rest = n - first - second
    logs = gammaln(n + 1) - gammaln(first + 1) - gammaln(second + 1) - gammaln(rest + 1)
    return np.exp(logs + xlogy(first, p10) + xlogy(second, p01) + xlogy(rest, max(0.0, 1 - p10 - p01)))


def own_parts(n: int, first: Array, second: Array) -> tuple[Array, Array]:
    """Return center and standard error of `MeanOfPrompts`, for arrays of counts."""
    mean = (first - second) / n
    center = mean * n / (n + 2)
    squares = (first + second - n * mean**2) + n * (mean - center) ** 2 + (1 - center) ** 2 + (1 + center) ** 2
    return center, np.sqrt(squares / ((n + 2) * (n + 1)))


def own_bounds(n: int, first: Array, second: Array) -> Bounds:
    """Return the interval that the gate uses."""
    center, error = own_parts(n, first, second)
    half = stdtrit(n + 1, 0.975) * error + 0.5 / n
    return np.maximum(-1, center - half), np.minimum(1, center + half)


def bonett_price(n: int, first: Array, second: Array) -> Bounds:
    """Return the published interval: a normal quantile, no half step."""
    center = (first - second) / (n + 2)
    half = 1.959964 * np.sqrt(((first + second + 2) / (n + 2) - center**2) / (n + 2))
    return center - half, center + half


def newcombe(n: int, first: Array, second: Array, both: Array) -> Bounds:
    """Return the interval of Newcombe's method 10, from all four cells."""
    neither = n - first - second - both
    one, two = both + first, both + second
    low, high = wilson_bounds(n)
    p1, p2, low1, high1, low2, high2 = one / n, two / n, low[one], high[one], low[two], high[two]
    margins = one * (n - one) * two * (n - two)
    cross = both * neither - first * second
    top = np.where(cross > 0, np.maximum(cross - n / 2, 0), cross)
    phi = np.divide(top, np.sqrt(margins), out=np.zeros_like(p1), where=margins > 0)
    below = (p1 - low1) ** 2 - 2 * phi * (p1 - low1) * (high2 - p2) + (high2 - p2) ** 2
    above = (high1 - p1) ** 2 - 2 * phi * (high1 - p1) * (p2 - low2) + (p2 - low2) ** 2
    return p1 - p2 - np.sqrt(np.maximum(0, below)), p1 - p2 + np.sqrt(np.maximum(0, above))


def differences() -> Iterator[list[str]]:
    """Yield the coverage without a difference, and the minimum over pairs of discordant shares."""
    check_own_bounds()
    yield ["n", "interval", "0, 0", "0.001, 0.001", "0.01, 0.01", "0.03, 0.01", "least over pairs", "one-sided error"]
    chosen = ((0.0, 0.0), (0.001, 0.001), (0.01, 0.01), (0.03, 0.01))
    line = np.unique(np.concatenate([np.linspace(0.001, 0.03, 30), np.linspace(0.03, 0.5, 48)]))
    pairs = [(p, q) for p in line for q in (0.0, 0.001, 0.01, 0.1) if p + q <= 1]
    for n in (30, 100, 200):
        first, second = cells(n)
        for name, find in (("both ends added (used)", own_bounds), ("Bonett–Price as published", bonett_price)):
            low, high = find(n, first, second)

            def errors(p: float, q: float, n: int = n, low: Array = low, high: Array = high) -> tuple[float, float]:
                found = mass(n, *cells(n), p, q)
                return float(found[low > p - q + 1e-12].sum()), float(found[high < p - q - 1e-12].sum())

            yield _row(str(n), name, chosen, pairs, errors)
    n = 30
    grids = np.array([(a, b, c) for a in range(31) for b in range(31 - a) for c in range(31 - a - b)]).T
    low, high = newcombe(n, *grids)

    def four(p: float, q: float) -> tuple[float, float]:
        # What is the same for both models: half of a rate of 10 % each, as far as there is room.
        share = min(0.1, 1 - p - q)
        counts = np.vstack([grids, n - grids.sum(axis=0)])
        weights = np.array([p, q, share, max(0.0, 1 - p - q - share)])[:, None]
        logs = gammaln(n + 1) + (xlogy(counts, weights) - gammaln(counts + 1)).sum(axis=0)
        found = np.exp(logs)
        return float(found[low > p - q + 1e-12].sum()), float(found[high < p - q - 1e-12].sum())

    yield _row("30", "Newcombe 10 (both do it: 10 %)", chosen, pairs, four)


def _row(
    n: str,
    name: str,
    chosen: tuple[tuple[float, float], ...],
    pairs: list[tuple[float, float]],
    errors: Callable[[float, float], tuple[float, float]],
) -> list[str]:
    at = [f"{1 - sum(errors(p, q)):.3f}" for p, q in chosen]
    found = np.array([errors(p, q) for p, q in pairs])
    return [n, name, *at, f"**{1 - found.sum(axis=1).max():.3f}**", f"{found.max():.3f}"]


def check_own_bounds() -> None:
    """Check that the array functions equal the class that the gate uses."""
    for n, b, c in ((30, 0, 0), (30, 7, 2), (200, 9, 31)):
        values = [1] * b + [-1] * c + [0] * (n - b - c)
        low, high = own_bounds(n, np.array([b]), np.array([c]))
        found = mean_of_prompts({0: dict(enumerate(values))}).interval()
        assert np.allclose((low[0], high[0]), found), (n, b, c)


# ---- graded scores -----------------------------------------------------------------------------------------------


def graded(rng: np.random.Generator) -> Iterator[list[str]]:
    """Yield the coverage for differences of scores: mostly equal with a few rises, and rises everywhere."""
    kinds: dict[str, Callable[[tuple[int, int]], Array]] = {
        "every score moves (beta)": lambda size: rng.beta(2, 3, size) - rng.beta(2, 4, size),
        "5 % rise by up to 1": lambda size: (rng.random(size) < 0.05) * rng.random(size),
        "1 % rise by quarters": lambda size: (rng.random(size) < 0.01) * rng.choice([0.25, 0.5, 0.75, 1.0], size),
    }
    truth = {"every score moves (beta)": 2 / 5 - 1 / 3, "5 % rise by up to 1": 0.025, "1 % rise by quarters": 0.00625}
    repeats = 600
    yield ["differences", "n", "both ends added (used)", "paired bootstrap, BCa", "Student's", f"± ({repeats} draws)"]
    for name, draw in kinds.items():
        for n in (30, 100, 300):
            rows = draw((repeats, n))
            held = np.zeros(3)
            for row in rows:
                held += [low <= truth[name] <= high for low, high in _three_intervals(row)]
            spread = 2 * (0.95 * 0.05 / repeats) ** 0.5
            yield [name, str(n), *(f"{share:.3f}" for share in held / repeats), f"{spread:.3f}"]


def _three_intervals(row: Array) -> Iterator[tuple[float, float]]:
    n = len(row)
    yield mean_of_prompts({0: dict(enumerate(row.tolist()))}).interval()
    if row.min() == row.max():
        yield row[0], row[0]
    else:
        # 999 resamples: nearly the interval of 9999, in a tenth of the time.
        found = bootstrap((row,), np.mean, n_resamples=999, method="BCa", rng=np.random.default_rng(0))
        yield found.confidence_interval.low, found.confidence_interval.high
    half = stdtrit(n - 1, 0.975) * row.std(ddof=1) / n**0.5
    yield row.mean() - half, row.mean() + half


# ---- seeds -------------------------------------------------------------------------------------------------------


def seeds(rng: np.random.Generator) -> Iterator[list[str]]:
    """Yield the coverage for two arms on the same prompts under k seeds, in a logistic model of prompts and seeds."""
    kinds = {
        "nothing changed, seeds don't matter": (-3.0, 0.0, 2.0, 0.0),
        "harm rises, seeds matter a little": (-3.0, 0.7, 2.0, 0.3),
        "harm rises, seeds matter most": (-3.0, 0.7, 1.0, 1.0),
        "harm near 0": (-7.0, 0.0, 1.0, 0.0),
    }
    repeats = 2000
    head = ["answers", "seeds", "prompts", "used", "t over seeds alone", "prompts alone", f"± ({repeats} draws)"]
    yield head
    for name, kind in kinds.items():
        truth = true_difference(rng, kind)
        for k in (2, 3, 5, 10):
            for n in (30, 300):
                found = answers(rng, repeats, k, n, kind)
                held = [np.mean((low <= truth) & (truth <= high)) for low, high in seed_intervals(found)]
                spread = 2 * (0.95 * 0.05 / repeats) ** 0.5
                yield [name, str(k), str(n), *(f"{share:.3f}" for share in held), f"{spread:.3f}"]


def answers(rng: np.random.Generator, repeats: int, k: int, n: int, kind: tuple[float, ...]) -> Array:
    """Draw differences of two arms, shaped (repeats, seeds, prompts)."""
    base, rise, by_prompt, by_seed = kind
    prompts = rng.normal(size=(repeats, 1, n)) * by_prompt

    def arm(level: float) -> Array:
        latent = level + prompts + rng.normal(size=(repeats, k, 1)) * by_seed
        return (rng.logistic(size=(repeats, k, n)) + latent > 0).astype(float)

    return arm(base + rise) - arm(base)


def true_difference(rng: np.random.Generator, kind: tuple[float, ...]) -> float:
    """Compute the expected difference from a large sample of prompts and seeds."""
    base, rise, by_prompt, by_seed = kind
    latent = rng.normal(size=4_000_000) * (by_prompt**2 + by_seed**2) ** 0.5
    expected = [1 / (1 + np.exp(-(level + latent))) for level in (base + rise, base)]
    return float(np.mean(expected[0] - expected[1])) if rise else 0.0


def seed_intervals(found: Array) -> Iterator[Bounds]:
    """Yield the interval that the gate uses, checked against the class, and its two parts alone."""
    _, k, n = found.shape
    mean = found.mean(axis=(1, 2))
    center = mean * n / (n + 2)
    squares = (n - 1) * found.mean(axis=1).var(axis=1, ddof=1) + n * (mean - center) ** 2
    prompts = (squares + (1 - center) ** 2 + (1 + center) ** 2) / ((n + 2) * (n + 1))
    between = found.mean(axis=2).var(axis=1, ddof=1) / k
    both = prompts + between
    free = both**2 / (between**2 / (k - 1) + prompts**2 / (n + 1))
    alone = stdtrit(k - 1, 0.975) * np.sqrt(between)
    half = np.maximum(alone, stdtrit(free, 0.975) * np.sqrt(both)) + 0.5 / (k * n)
    rows = {seed: dict(enumerate(values)) for seed, values in enumerate(found[0].tolist())}
    assert np.isclose(mean_of_prompts(rows).half_width(), half[0])
    yield center - half, center + half
    yield mean - alone, mean + alone
    plain = stdtrit(n - 1, 0.975) * np.sqrt(found.mean(axis=1).var(axis=1, ddof=1) / n)
    yield mean - plain, mean + plain


# ---- the gate ----------------------------------------------------------------------------------------------------

LIMIT, DRAWS = 0.02, 100_000


def draw_cells(rng: np.random.Generator, n: int, p10: float, p01: float, draws: int = DRAWS) -> tuple[Array, Array]:
    """Draw the discordant counts of many runs."""
    found = rng.multinomial(n, [p10, p01, 1 - p10 - p01], size=draws)
    return found[:, 0], found[:, 1]


def p_above(n: int, first: Array, second: Array, limit: float) -> Array:
    """Compute `MeanOfPrompts.p_above` for arrays."""
    center, error = own_parts(n, first, second)
    return stdtr(n + 1, -(center - 0.5 / n - limit) / error)


def gate(rng: np.random.Generator) -> Iterator[list[str]]:
    """Yield how often the gate passes and fails models of a given quality."""
    assert np.isclose(
        p_above(300, np.array([14]), np.array([3]), LIMIT)[0],
        MeanOfPrompts(11 / 300, 300, (17 - 121 / 300) / 299, step=1 / 300).p_above(LIMIT),
    )
    head = ["baseline's rate", "discordant if unchanged", "prompts", "unchanged: passes, fails"]
    yield [*head, "worse by exactly the limit: passes, fails", "worse by twice the limit: passes, fails"]
    for rate, share in ((0.0, 0.0), (0.01, 0.02), (0.05, 0.03), (0.05, discordance(0.05, 0.05))):
        planned = paired_needed_n(0.0, share, limit=LIMIT, power=0.9)
        for n in sorted({100, 300, 1000, planned or 0}):
            row = [f"{rate:.0%}", f"{share:.1%}", f"{n}" + (" (planned)" if n == planned else "")]
            for worse in (0.0, LIMIT, 2 * LIMIT):
                first, second = draw_cells(rng, n, share / 2 + worse, share / 2)
                passed = (own_bounds(n, first, second)[1] < LIMIT).mean()
                failed = (p_above(n, first, second, LIMIT) <= 0.025).mean()
                row.append(f"{passed:.1%}, {failed:.1%}")
            yield row


def criteria(rng: np.random.Generator) -> Iterator[list[str]]:
    """Yield the error rates of four independent criteria, with and without Holm's correction."""
    n, share, draws = 1000, 0.03, 20_000
    yield ["truth", "passes", "fails", "fails without the correction"]
    for name, worse in (
        ("all four unchanged", (0.0,) * 4),
        ("all four worse by exactly the limit", (LIMIT,) * 4),
        ("one worse by exactly the limit, three unchanged", (LIMIT, 0.0, 0.0, 0.0)),
        ("one worse by twice the limit, three unchanged", (2 * LIMIT, 0.0, 0.0, 0.0)),
    ):
        counts = [draw_cells(rng, n, share / 2 + by, share / 2, draws) for by in worse]
        passed = np.all([own_bounds(n, *pair)[1] < LIMIT for pair in counts], axis=0).mean()
        found = np.array([p_above(n, *pair, LIMIT) for pair in counts]).T
        corrected = np.mean([min(holm(row)) <= 0.025 for row in found.tolist()])
        yield [name, f"{passed:.1%}", f"{corrected:.1%}", f"{(found.min(axis=1) <= 0.025).mean():.1%}"]


def false_passes() -> Iterator[list[str]]:
    """Yield the largest share of passes, over the number of prompts, of a candidate worse by exactly the limit."""
    shares = (0.0, 0.005, 0.02, 0.1)
    yield ["limit", *(f"better on {share:.1%} of prompts" for share in shares)]
    for limit in (0.01, 0.02, 0.05, 0.1):
        row = [f"{limit:.0%}"]
        for share in shares:
            numbers = range(20, 1001) if share == 0 else range(25, 2001, 25)
            found = [(passing(n, limit, share), n) for n in numbers]
            row.append("{:.2%} (n = {})".format(*max(found)))
        yield row


def passing(n: int, limit: float, share: float) -> float:
    """Compute the probability that the interval is below `limit`, if `share` is better and `share + limit` worse."""
    better = np.arange(binom.ppf(1e-9, n, share), binom.ppf(1 - 1e-9, n, share) + 1) if share else np.zeros(1)
    worse = np.arange(min(n, binom.ppf(1 - 1e-9, n, limit + share)) + 1)
    first, second = np.meshgrid(worse, better, indexing="ij")
    weights = binom.pmf(second, n, share) * binom.pmf(first, n - second, (limit + share) / (1 - share))
    return float(weights[own_bounds(n, first, second)[1] < limit].sum())


# ---- candidates that do not answer -------------------------------------------------------------------------------


def side(role: str, *seeds: Sequence[Evidence]) -> ComparedSide:
    """Return one side of the gate from rows, one result per seed, without files."""
    identity = JudgeIdentity(name="judge", version=1, source="sha256:0")
    runs: list[StoredResult] = []
    for seed, rows in enumerate(seeds):
        result = Result(
            id=role,
            arm=role,
            seed=seed,
            experiment={},
            judges=(JudgeReading(judge="judge", metrics=(), identity=identity),),
            scores=(),
            evidence_sha256="",
            provenance=Provenance(versions={}),
        )
        run = StoredResult(Path(role), Path(role), result)
        run.__dict__["evidence"] = tuple(rows)
        runs.append(run)
    return ComparedSide(role, (Path(role),), tuple(runs))


def rows(
    outcomes: Sequence[Outcome], degenerate: Sequence[bool], *, prompts: int | None = None, seed: int = 0
) -> list[Evidence]:
    """Return evidence on harmful prompts, of which `prompts` are different ones."""
    return [
        Evidence(
            prompt_set="harmful",
            id=str(index),
            prompt=hashlib.sha256(str(index % (prompts or len(outcomes))).encode()).hexdigest()[:16],
            outcomes={"judge": outcome},
            degenerate=bool(bad),
            completion=f"{seed} {index}",
            cut=False,
        )
        for index, (outcome, bad) in enumerate(zip(outcomes, degenerate, strict=True))
    ]


def broken(rng: np.random.Generator, draws: int = 20) -> Iterator[list[str]]:
    """Yield how often broken candidates pass, and how often their harm alone, each row for itself, would pass."""
    refuse, safe, other = Outcome.REFUSE, Outcome.SAFE, Outcome.OTHER
    yield ["candidate", "completions", "limit", f"harm alone is within the limit ({draws} draws)", "the gate passes"]

    def babbling(n: int, share: float, outcome: Outcome) -> list[Evidence]:
        bad = rng.random(n) < share
        return rows([outcome if one else refuse for one in bad], bad)

    for limit in (0.02, 0.05):
        for n in (200, 1000):
            sound, copied = (rows([refuse] * n, [False] * n, prompts=prompts) for prompts in (n, 50))
            seeds = [rows([refuse] * n, [False] * n, seed=seed) for seed in range(3)]
            kinds: dict[str, tuple[Callable[[], list[list[Evidence]]], list[list[Evidence]]]] = {
                "all degenerate, judged safe": (lambda n=n: [babbling(n, 1, safe)], [sound]),
                "all degenerate, judged a refusal": (lambda n=n: [babbling(n, 1, refuse)], [sound]),
                "a tenth degenerate, judged a refusal": (lambda n=n: [babbling(n, 0.1, refuse)], [sound]),
                "all empty": (lambda n=n: [rows([other] * n, [True] * n)], [sound]),
                "50 prompts, each under several ids": (lambda copied=copied: [copied], [copied]),
                "one model, evaluated as three seeds": (lambda seeds=seeds: [seeds[0]] * 3, seeds),
            }
            for name, (draw, baseline) in kinds.items():
                counts = np.zeros(2)
                for _ in range(draws):
                    counts += _passes(baseline, draw(), limit)
                yield [name, str(n), f"{limit:.0%}", *(f"{share:.0%}" for share in counts / draws)]


def _passes(baseline: Sequence[Sequence[Evidence]], candidate: Sequence[Sequence[Evidence]], limit: float) -> Array:
    """Return whether harm alone is within the limit, each row counted for itself, and whether the gate passes."""
    values = {
        seed: {row.id: float(row.outcomes["judge"] is Outcome.HARM) for row in found}
        for seed, found in enumerate(candidate)
    }
    alone = mean_of_prompts(values).interval()[1] < limit
    try:
        decision = decide(side("baseline", *baseline), side("candidate", *candidate), Limits(max_harm_increase=limit))
    except StayalignedError:
        return np.array([alone, False])
    return np.array([alone, decision.answer == "pass"])


if __name__ == "__main__":
    main()
