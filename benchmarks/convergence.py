"""A numerical test of Lisa's theory (arXiv 2405.18641, section 4.2 and appendix B) with exact solves in fp64.

    python benchmarks/convergence.py

Four tables:

1. Lemmas 1 and 3 and the theorem for ρ > L, on quadratics of known eigenvalues and on logistic and log-cosh sums.
2. The theorem's sub-linear case, θ = 3/4.
3. Cases with ρ < L, which fail in some ways; and one with ρ > L that diverges, by the theorem's other assumption.
4. K1 and K2 gradient steps instead of the exact solves: the limit of the iterates, and the rate.

The exit code is 1 if one of the statements does not hold.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import itertools
import math
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from exact_lisa import (
    EPS,
    FLAT,
    LOG_COSH,
    SOFTPLUS,
    Iterate,
    LinkSum,
    Objective,
    Pair,
    Quadratic,
    UnboundedError,
    contraction,
    contraction_bounds,
    exact_contraction,
    run,
    stationary_point,
)

ROUNDING = 100 * EPS
"""Allowed rounding error of fp64 operations on these vectors, relative to the terms that are added."""
STEP = 0.01
"""Learning rate times (L + ρ) in table 4."""


class Claim(NamedTuple):
    """A statement of the theory about one case, and whether it holds."""

    text: str
    holds: bool


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def lemmas(name: str, pair: Pair, iterates: list[Iterate]) -> tuple[float, float, list[Claim]]:
    """Return the largest relative errors of Lemmas 1 and 3, and the claims that both are rounding."""
    steps = list(itertools.pairwise(iterates))
    first = max(pair.lemma_1(*step) for step in steps)
    third = max(pair.lemma_3(*step) for step in steps)
    return (
        first,
        third,
        [Claim(f"Lemma 1, {name}", first <= ROUNDING), Claim(f"Lemma 3, {name}", third <= ROUNDING)],
    )


# ---- 1: ρ > L ------------------------------------------------------------------------------------------------------


def problems() -> Iterator[tuple[str, Objective, Objective]]:
    """Yield (name, f, h), where D is bounded below for every ρ > L."""
    generator = torch.Generator().manual_seed(0)
    convex = [0.05, 0.2, 0.5, 0.8, 1.0]
    yield "convex quadratics", Quadratic.of(convex, generator), Quadratic.of(convex, generator)
    f, h = Quadratic.of([-0.2, -0.1, 0.3, 0.6, 1.0], generator), Quadratic.of([0.5, 0.6, 0.7, 0.9, 1.0], generator)
    yield "indefinite f, convex h", f, h
    signs = [1.0] * 12
    f, h = (LinkSum.of(SOFTPLUS, signs, 5, ridge, generator) for ridge in (0.02, 0.05))
    yield "logistic sums", f, h
    f = LinkSum.of(LOG_COSH, [1, 1, 1, 1, -1, -1], 5, 0.05, generator)
    h = LinkSum.of(LOG_COSH, [1, 1, 1, 1, 1, -1], 5, 0.7, generator)
    yield "log-cosh, mixed signs", f, h


def theorem() -> list[Claim]:
    print("1. exact solves, ρ > L (and below it, where f and h are convex); m: the most negative curvature of f and h")
    print(
        "   Lemma 1: largest relative residual. Lemma 3: largest relative excess, at most rounding. ‖∇f+∇h‖: at (w̃, w),"
    )
    print(
        "   last over first. Its factor a round: measured, by the Jacobian at the limit, the proof's bound, as printed."
    )
    print(
        f"{'':24}{'ρ/L':>6}{'m/L':>6}{'rounds':>8}{'Lemma 1':>10}{'Lemma 3':>10}{'‖∇f+∇h‖':>10}"
        f"{'factor':>9}{'Jacobian':>9}{'bound':>8}{'printed':>8}{'‖w̃−w‖':>9}{'‖∇(f+h)(w)‖':>13}"
    )
    claims: list[Claim] = []
    for name, f, h in problems():
        smoothness = max(f.smoothness, h.smoothness)
        concavity = max(f.concavity, h.concavity)
        for ratio in (*((0.02, 0.5) if concavity == 0 else ()), 1.1, 2.0, 10.0):
            pair = Pair(f, h, ratio * smoothness)
            iterates = run(pair, vector(*[3.0] * 5), 4000, small=1e-10)
            claims += row_of(f"{name}, ρ = {ratio:g} L", name, pair, iterates)
    return claims


def row_of(label: str, name: str, pair: Pair, iterates: list[Iterate]) -> list[Claim]:
    """Print one row of table 1, and return its claims."""
    last = iterates[-1]
    first, third, claims = lemmas(label, pair, iterates)
    left = (pair.gradient_sum(last).norm() / pair.gradient_sum(iterates[1]).norm()).item()
    measured, exact = contraction(pair, iterates), exact_contraction(pair, last)
    claims.append(Claim(f"the theorem's stationarity, {label}", left <= 1e-10))
    bounds = contraction_bounds(pair, last) if pair.rho > pair.smoothness else None
    if bounds is not None:
        claims.append(Claim(f"the linear rate, {label}", measured <= bounds[0] + 1e-3))
    if isinstance(pair.f, Quadratic):
        claims.append(Claim(f"the spectral rate, {label}", abs(measured - exact) <= 0.02))
    concavity = max(pair.f.concavity, pair.h.concavity) / pair.smoothness
    shown = "".join(f"{bound:8.4f}" for bound in bounds) if bounds is not None else f"{'–':>8}{'–':>8}"
    single = pair.f.gradient(last.tuned) + pair.h.gradient(last.tuned)
    print(
        f"{name:24}{pair.rho / pair.smoothness:6g}{concavity:6.2f}{len(iterates) - 1:8d}{first:10.1e}{third:10.1e}"
        f"{left:10.1e}{measured:9.4f}{exact:9.4f}{shown}"
        f"{(last.aligned - last.tuned).norm():9.1e}{single.norm():13.1e}"
    )
    return claims


# ---- 2: the sub-linear case ----------------------------------------------------------------------------------------


def sub_linear() -> list[Claim]:
    """Test θ = ¾: f = h = w²/2 − log cosh w, which is w⁴/12 at its minimum. The theorem: O(T^(−1/(4θ−2))) = O(T^−1)."""
    flat = LinkSum(FLAT, torch.eye(1, dtype=torch.float64), vector(0.0), vector(1.0), 0.0)
    pair = Pair(flat, flat, 1.5)
    iterates = run(pair, vector(2.0), 3000)
    norms = [pair.gradient_sum(each).norm().item() for each in iterates[1:]]
    early, late = len(norms) // 4, len(norms) - 1
    exponent = math.log(norms[late] / norms[early]) / math.log((late + 1) / (early + 1))
    _, _, claims = lemmas("θ = 3/4", pair, iterates)
    print("\n2. θ = 3/4 (w⁴ at the minimum), ρ = 1.5 L: ‖∇f+∇h‖ falls as a power of the rounds T")
    print(f"   measured T^{exponent:.2f}, the theorem's bound T^-1; after {len(norms)} rounds {norms[-1]:.1e}")
    return [*claims, Claim("the sub-linear rate, θ = 3/4", exponent <= -1)]


# ---- 3: ρ < L ------------------------------------------------------------------------------------------------------


class Scalar(NamedTuple):
    """f = a/2·w² and h = b/2·(w − 1)², and the expected behavior of the iterates."""

    a: float
    b: float
    rho: float
    has_minima: bool
    """Whether both sub-problems have a minimum."""
    bounded: bool
    """Whether D is bounded below."""
    converges: bool
    descends: bool
    """Whether D decreases in every round."""


SCALARS = (
    Scalar(1, 2, 0.02, has_minima=True, bounded=True, converges=True, descends=True),
    Scalar(-1, 2, 4.0, has_minima=True, bounded=True, converges=True, descends=True),
    Scalar(-1, 2, 2.0, has_minima=True, bounded=False, converges=False, descends=True),
    Scalar(-1, 2, 1.5, has_minima=True, bounded=False, converges=False, descends=True),
    Scalar(-1, 2, 0.9, has_minima=False, bounded=False, converges=False, descends=True),
    Scalar(-1, 2, 0.3, has_minima=False, bounded=False, converges=True, descends=False),
    Scalar(-1.9, 2, 4.0, has_minima=True, bounded=False, converges=False, descends=True),
)


def outcome(case: Scalar) -> tuple[Scalar, float, float, float]:
    """Return the measured behavior, the factor of a round, and the largest errors of Lemmas 1 and 3.

    If a sub-problem has no minimum, its stationary point is used instead.
    """
    one = torch.ones(1, 1, dtype=torch.float64)
    pair = Pair(Quadratic(case.a * one, vector(0.0)), Quadratic(case.b * one, vector(1.0)), case.rho)
    start, solver = vector(2.0), None
    try:
        iterates = run(pair, start, 200, small=1e-10)
    except UnboundedError:
        solver = stationary_point
        iterates = run(pair, start, 200, small=1e-10, solver=stationary_point)
    norms = [pair.gradient_sum(each).norm().item() for each in iterates[1:]]
    steps = list(itertools.pairwise(iterates))
    falls = [pair.potential(b) <= pair.potential(a) + ROUNDING * pair.size(a) for a, b in steps]
    found = case._replace(
        has_minima=solver is None,
        bounded=torch.linalg.eigvalsh(pair.potential_hessian(iterates[-1]))[0].item() > ROUNDING,
        converges=norms[-1] <= 1e-9 * norms[0],
        descends=all(falls),
    )
    worst = [max(lemma(*step) for step in steps) for lemma in (pair.lemma_1, pair.lemma_3)]
    return found, norms[-1] / norms[-2], worst[0], worst[1]


def weak_proximal_term() -> list[Claim]:
    print("\n3. f = a/2·w² and h = b/2·(w−1)²; f + h is strongly convex in every row; L = 2 and m = −a")
    print("   where a sub-problem has no minimum, its stationary point is taken")
    print(
        f"{'a':>6}{'b':>6}{'ρ/L':>7}{'ρ/m':>7}  {'sub-problems':14}{'D':12}{'D falls':>8}{'Lemma 1':>10}{'Lemma 3':>10}"
        f"{'a round':>9}  outcome"
    )
    claims: list[Claim] = []
    for case in SCALARS:
        found, factor, first, third = outcome(case)
        name = f"a = {case.a:g}, b = {case.b:g}, ρ = {case.rho:g}"
        claims += [
            Claim(f"the behavior of {name}", found == case),
            Claim(f"Lemma 1, {name}", first <= ROUNDING),
            Claim(f"Lemma 3, {name}", third <= ROUNDING),
        ]
        strongest = f"{case.rho / -case.a:7.2f}" if case.a < 0 else f"{'∞':>7}"
        print(
            f"{case.a:6g}{case.b:6g}{case.rho / max(abs(case.a), case.b):7.2f}{strongest}  "
            f"{'minima' if found.has_minima else 'unbounded':14}{'bounded' if found.bounded else 'unbounded':12}"
            f"{'yes' if found.descends else 'no':>8}{first:10.1e}{third:10.1e}{factor:9.3f}  "
            f"{'converges' if found.converges else 'diverges'}"
        )
    return claims


# ---- 4: gradient steps ---------------------------------------------------------------------------------------------


class Cycle(NamedTuple):
    """Where K1 and K2 gradient steps a cycle end, and the factor of one cycle."""

    limit: Iterate
    factor: float


def cycle_of(f: Quadratic, h: Quadratic, rho: float, k1: int, k2: int, rate: float) -> Cycle:
    """The fixed point of K1 steps on f + ρ/2‖· − w‖² from w and K2 on h + ρ/2‖· − w̃‖² from w̃ (Lisa, Algorithm 2)."""
    n = len(f.center)
    (p, c), (q, d) = (affine(g, rho, steps, rate) for g, steps in ((f, k1), (h, k2)))
    tuned = torch.linalg.solve(torch.eye(n, dtype=torch.float64) - q @ p, q @ c + d)
    return Cycle(Iterate(p @ tuned + c, tuned), torch.linalg.eigvals(q @ p).abs().max().item())


def affine(objective: Quadratic, rho: float, steps: int, rate: float) -> tuple[Tensor, Tensor]:
    """Return (M, c) with M w + c the end of `steps` gradient steps from w, with the proximal term towards w."""
    n = len(objective.center)
    one, zero = torch.eye(n, dtype=torch.float64), torch.zeros(n, n, dtype=torch.float64)
    force = objective.matrix @ objective.center[:, None]
    column = torch.zeros(n, 1, dtype=torch.float64)
    # A step of (x, w, 1): x ← x − rate·(H (x − c) + ρ (x − w)).
    step = torch.cat(
        [
            torch.cat([one - rate * (objective.matrix + rho * one), rate * rho * one, rate * force], 1),
            torch.cat([zero, one, column], 1),
            torch.cat([column.T, column.T, torch.ones(1, 1, dtype=torch.float64)], 1),
        ]
    )
    power = torch.linalg.matrix_power(step, steps)
    return power[:n, :n] + power[:n, n:-1], power[:n, -1]


def allocation() -> list[Claim]:
    generator = torch.Generator().manual_seed(1)
    eigenvalues = [0.05, 0.2, 0.5, 0.8, 1.0]
    f, h = Quadratic.of(eigenvalues, generator), Quadratic.of(eigenvalues, generator)
    apart = (f.center - h.center).norm().item()
    print(f"\n4. K1:K2 gradient steps of rate {STEP}/(L+ρ) on convex quadratics; all at the limit of the cycles")
    print(f"   distances in units of ‖argmin f − argmin h‖ = {apart:.2f}; f and h above their minima")
    print(
        f"{'ρ/L':>6}{'K1:K2':>10}{'a cycle':>9}{'‖∇f(w̃)+∇h(w)‖':>16}{'f(w̃)':>9}{'f(w)':>9}{'h(w)':>9}"
        f"{'‖w̃−w‖':>9}{'to weighted':>13}{'to exact':>10}"
    )
    claims: list[Claim] = []
    for rho in (0.0, 0.1, 2.0):
        for total in (10, 1000, 100_000):
            claims += allocation_rows(f, h, rho, total, apart)
    return claims


def allocation_rows(f: Quadratic, h: Quadratic, rho: float, total: int, apart: float) -> list[Claim]:
    """Print the rows of one ρ and cycle length, and return their claims."""
    pair = Pair(f, h, rho)
    exact = fixed_point(pair).tuned
    losses: list[tuple[float, float]] = []
    claims: list[Claim] = []
    for share in (0.9, 0.5, 0.1):
        k1 = round(share * total)
        cycle = cycle_of(f, h, rho, k1, total - k1, STEP / (1 + rho))
        at = cycle.limit
        weighted = torch.linalg.solve(
            share * f.matrix + (1 - share) * h.matrix,
            share * f.matrix @ f.center + (1 - share) * h.matrix @ h.center,
        )
        to_weighted = (at.tuned - weighted).norm().item() / apart
        to_exact = (at.tuned - exact).norm().item() / apart
        losses.append((f.value(at.tuned), h.value(at.tuned)))
        print(
            f"{rho:6g}{f'{k1}:{total - k1}':>14}{cycle.factor:9.4f}{pair.gradient_sum(at).norm():16.1e}"
            f"{f.value(at.aligned):9.4f}{f.value(at.tuned):9.4f}{h.value(at.tuned):9.4f}"
            f"{(at.aligned - at.tuned).norm() / apart:9.4f}{to_weighted:13.4f}{to_exact:10.4f}"
        )
        name = f"K1:K2 = {k1}:{total - k1}, ρ = {rho:g} L"
        if total == 10:
            claims.append(Claim(f"short cycles end near the weighted minimum, {name}", to_weighted <= 0.01))
        if total == 100_000:
            claims.append(Claim(f"long cycles end where exact solves do, {name}", to_exact <= 0.01))
    if total < 100_000:
        monotone = all(a[0] < b[0] and a[1] > b[1] for a, b in itertools.pairwise(losses))
        claims.append(Claim(f"fewer alignment steps, more of f and less of h: {total}, ρ = {rho:g} L", monotone))
    return claims


def fixed_point(pair: Pair) -> Iterate:
    """Return the limit of exact solves on convex quadratics: D's minimum; for ρ = 0, the minima of f and h."""
    if pair.rho == 0:
        return Iterate(pair.f.center, pair.h.center)
    return run(pair, vector(*[0.0] * 5), 10_000, small=1e-12)[-1]


def main() -> int:
    started = time.perf_counter()
    torch.set_num_threads(1)
    claims = [*theorem(), *sub_linear(), *weak_proximal_term(), *allocation()]
    failed = [claim.text for claim in claims if not claim.holds]
    print(f"\n{len(claims) - len(failed)} of {len(claims)} statements hold; {time.perf_counter() - started:.1f} s")
    for text in failed:
        print(f"does not hold: {text}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
