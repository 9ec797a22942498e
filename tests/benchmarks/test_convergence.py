"""The statements of `benchmarks/convergence.py` about Lisa's theory, on random problems and by simpler methods."""

import importlib
import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
exact: Any = importlib.import_module("exact_lisa")
bench: Any = importlib.import_module("convergence")
sys.path.pop(0)


def spectra_within(f_range: tuple[float, float], h_range: tuple[float, float]) -> st.SearchStrategy[Any]:
    """Draw equally many eigenvalues of f and of h."""
    return st.integers(1, 4).flatmap(
        lambda n: st.tuples(*[st.lists(st.floats(*r), min_size=n, max_size=n) for r in (f_range, h_range)])
    )


SPECTRA = spectra_within((-1, 1), (-1, 1))
BOUNDED_SPECTRA = spectra_within((-0.2, 1), (0.5, 1))
"""f is not convex, but D has a minimum for every ρ > L."""
RATIOS = st.floats(1.02, 20)


def quadratic_pair(spectra: Any, seed: int, rho: float) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return exact.Pair(*(exact.Quadratic.of(eigenvalues, generator) for eigenvalues in spectra), rho)


def start_of(pair: Any) -> torch.Tensor:
    return torch.linspace(-2, 2, len(pair.f.center), dtype=torch.float64) + 0.5


def link_pair(ratio: float, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    f = exact.LinkSum.of(exact.LOG_COSH, [1, 1, -1, -1], 3, 0.1, generator)
    h = exact.LinkSum.of(exact.SOFTPLUS, [1, 1, 1, 1], 3, 2.5, generator)
    return exact.Pair(f, h, ratio * max(f.smoothness, h.smoothness))


@given(SPECTRA, RATIOS, st.integers(0, 1000))
def test_both_lemmas_hold_for_every_pair_of_quadratics_and_rho_above_l(spectra: Any, ratio: float, seed: int) -> None:
    unit = quadratic_pair(spectra, seed, 1.0)
    assume(unit.smoothness > 1e-3)
    pair = exact.Pair(unit.f, unit.h, ratio * unit.smoothness)
    iterates = exact.run(pair, start_of(pair), 20)
    for before, after in itertools.pairwise(iterates):
        assert pair.lemma_1(before, after) <= bench.ROUNDING
        assert pair.lemma_3(before, after) <= bench.ROUNDING


@settings(max_examples=25)
@given(BOUNDED_SPECTRA, RATIOS, st.integers(0, 1000))
def test_the_limit_is_stationary_and_the_gap_shrinks_by_the_bound(spectra: Any, ratio: float, seed: int) -> None:
    unit = quadratic_pair(spectra, seed, 1.0)
    pair = exact.Pair(unit.f, unit.h, ratio * unit.smoothness)
    at = exact.Iterate(start_of(pair), start_of(pair))
    iterates = exact.run(pair, start_of(pair), 5000, small=1e-8)
    first, last = (pair.gradient_sum(each).norm().item() for each in (iterates[1], iterates[-1]))
    assert last <= max(1e-8 * first, 1e-12)
    # The minimum of a quadratic D, from one linear system.
    right_side = torch.cat([pair.f.matrix @ pair.f.center, pair.h.matrix @ pair.h.center])
    minimum = torch.linalg.solve(pair.potential_hessian(at), right_side)
    found = torch.cat([iterates[-1].aligned, iterates[-1].tuned])
    torch.testing.assert_close(found, minimum, rtol=1e-4, atol=1e-4)
    if first > 1e-6:
        # By Lemma 3 and the KL inequality the gap to D's minimum shrinks in every round by at least this factor.
        bound, _ = exact.contraction_bounds(pair, at)
        least = pair.potential(exact.Iterate(*minimum.chunk(2)))
        gaps = [pair.potential(each) - least for each in iterates]
        for before, after in itertools.pairwise(gaps):
            assert after <= bound**2 * before + 1e-11 * (1 + abs(least))


@settings(max_examples=40)
@given(st.floats(1.02, 10), st.integers(0, 200))
def test_both_lemmas_hold_for_a_pair_that_is_neither_quadratic_nor_convex(ratio: float, seed: int) -> None:
    pair = link_pair(ratio, seed)
    iterates = exact.run(pair, torch.tensor([3.0, -2.0, 1.0], dtype=torch.float64), 15)
    for before, after in itertools.pairwise(iterates):
        assert pair.lemma_1(before, after) <= bench.ROUNDING
        assert pair.lemma_3(before, after) <= bench.ROUNDING


@pytest.mark.parametrize("link", ["SOFTPLUS", "LOG_COSH", "FLAT"])
def test_the_functions_have_the_stated_derivatives_and_bounds(link: str) -> None:
    generator = torch.Generator().manual_seed(0)
    one = exact.LinkSum.of(getattr(exact, link), [1, 1, -1, 1], 3, 0.3, generator)
    for _ in range(20):
        w = 4 * torch.randn(3, generator=generator, dtype=torch.float64)
        v = w.clone().requires_grad_()
        terms = one.signs * one.link.value(one.rows @ v - one.offsets)
        (gradient,) = torch.autograd.grad(terms.sum() + one.ridge / 2 * v @ v, v)
        torch.testing.assert_close(one.gradient(w), gradient)
        torch.testing.assert_close(one.hessian(w), torch.autograd.functional.jacobian(one.gradient, w))
        eigenvalues = torch.linalg.eigvalsh(one.hessian(w))
        assert eigenvalues.abs().max() <= one.smoothness
        assert -eigenvalues[0] <= one.concavity


def test_the_solution_of_a_sub_problem_is_its_minimum() -> None:
    pair = link_pair(1.1, 3)
    anchor = torch.tensor([3.0, -2.0, 1.0], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for objective in (pair.f, pair.h, exact.Quadratic.of([-1.0, 0.2, 1.0], generator)):
        found = exact.solve(objective, pair.rho, anchor)

        def total(w: torch.Tensor, objective: Any = objective) -> float:
            return objective.value(w) + pair.rho / 2 * float((w - anchor) @ (w - anchor))

        for scale in (1e-3, 0.1, 3.0):
            assert total(found) < total(found + scale * torch.randn(3, generator=generator, dtype=torch.float64))


def test_below_l_a_sub_problem_can_have_no_minimum_and_the_iterates_can_diverge() -> None:
    no_minimum, diverging = (next(c for c in bench.SCALARS if c[:3] == (-1, 2, rho)) for rho in (0.9, 1.5))
    assert not bench.outcome(no_minimum)[0].has_minima
    assert not bench.outcome(diverging)[0].converges
    one = torch.ones(1, 1, dtype=torch.float64)
    concave, convex = exact.Quadratic(-one, bench.vector(0.0)), exact.Quadratic(2 * one, bench.vector(1.0))
    with pytest.raises(exact.UnboundedError):
        exact.run(exact.Pair(concave, convex, 0.9), bench.vector(2.0), 1)
    # Gradient steps on it diverge.
    w = bench.vector(2.0)
    for _ in range(400):
        w = w - 0.1 * (concave.gradient(w) + 0.9 * (w - 2.0))
    assert w.abs() > 50


@pytest.mark.parametrize("case", bench.SCALARS, ids=lambda c: f"{c.a:g},{c.b:g},{c.rho:g}")
def test_a_round_multiplies_the_distance_by_its_closed_form_factor(case: Any) -> None:
    found, factor, first, third = bench.outcome(case)
    assert found == case
    assert abs(factor) == pytest.approx(abs(case.rho**2 / ((case.rho + case.a) * (case.rho + case.b))), rel=1e-3)
    assert max(first, third) <= bench.ROUNDING


def test_gradient_steps_end_at_the_fixed_point_of_their_cycle() -> None:
    generator = torch.Generator().manual_seed(2)
    f, h = (exact.Quadratic.of([0.2, 0.6, 1.0], generator) for _ in range(2))
    w = torch.zeros(3, dtype=torch.float64)
    for _ in range(300):
        aligned = w
        for objective, steps in ((f, 3), (h, 7)):
            anchor = w
            for _ in range(steps):
                w = w - 0.1 * (objective.gradient(w) + 0.5 * (w - anchor))
            aligned = w if objective is f else aligned
    cycle = bench.cycle_of(f, h, 0.5, 3, 7, 0.1)
    torch.testing.assert_close(cycle.limit.tuned, w)
    torch.testing.assert_close(cycle.limit.aligned, aligned)


def test_a_false_statement_is_named_and_fails_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for section in ("theorem", "sub_linear", "allocation"):
        monkeypatch.setattr(bench, section, list)
    assert bench.main() == 0
    # A solver that stops before the minimum.
    solve = exact.solve
    monkeypatch.setattr(bench, "run", lambda *a, **k: exact.run(*a, **{"solver": short, **k}))

    def short(objective: Any, rho: float, anchor: torch.Tensor) -> torch.Tensor:
        return anchor + 0.9 * (solve(objective, rho, anchor) - anchor)

    assert bench.main() == 1
    assert "does not hold: Lemma 1, a = 1, b = 2, ρ = 0.02" in capsys.readouterr().err
