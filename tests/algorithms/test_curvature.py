"""The ends of a spectrum and Hessian-vector products, against dense matrices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stayaligned.algorithms.curvature import Eigenvalue, Spectrum, hessian_product, random_start, spectrum_ends
from stayaligned.core.errors import StayalignedError


def symmetric(eigenvalues: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    n = len(eigenvalues)
    basis = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
    matrix = basis @ torch.diag(eigenvalues) @ basis.T
    return (matrix + matrix.T) / 2


def ends(matrix: Tensor, iterations: int, *, seed: int = 0, keep_basis: bool = True) -> Spectrum:
    start = random_start([torch.zeros(len(matrix), dtype=matrix.dtype)], seed)
    return spectrum_ends(lambda vector: matrix @ vector, start, iterations, keep_basis=keep_basis)


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=12), st.integers(0, 1000), st.integers(1, 20))
def test_the_values_lie_within_the_spectrum_and_an_eigenvalue_within_the_error(
    values: list[float], seed: int, iterations: int
) -> None:
    eigenvalues = torch.tensor(values, dtype=torch.float64)
    found = ends(symmetric(eigenvalues, seed), iterations, seed=seed)
    slack = 1e-12 * (1 + eigenvalues.abs().max().item())
    for end in (found.largest, found.smallest):
        assert eigenvalues.min() - slack <= end.value <= eigenvalues.max() + slack
        assert (eigenvalues - end.value).abs().min() <= end.error + slack
    assert found.iterations <= min(iterations, len(values))
    assert found.smoothness.value == max(abs(found.largest.value), abs(found.smallest.value))
    assert found.concavity == max(0.0, -found.smallest.value)


@given(st.integers(1, 12), st.integers(0, 1000))
def test_as_many_products_as_dimensions_give_the_dense_extremes(n: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(n, n, generator=generator, dtype=torch.float64)
    matrix = random + random.T
    dense = torch.linalg.eigvalsh(matrix)
    found = ends(matrix, n, seed=seed)
    assert found.largest.value == pytest.approx(dense[-1].item(), rel=1e-9, abs=1e-9)
    assert found.smallest.value == pytest.approx(dense[0].item(), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("keep_basis", [True, False])
def test_few_products_suffice_for_well_separated_ends(keep_basis: bool) -> None:
    eigenvalues = torch.cat([torch.linspace(-1, 1, 398), torch.tensor([-7.0, 30.0])]).double()
    found = ends(symmetric(eigenvalues, 1), 25, keep_basis=keep_basis)
    assert found.largest.value == pytest.approx(30, rel=1e-9)
    assert found.smallest.value == pytest.approx(-7, rel=1e-9)
    assert max(found.largest.error, found.smallest.error) < 1e-6


def test_an_end_that_has_not_converged_has_a_large_error() -> None:
    eigenvalues = torch.linspace(-1, 1, 400).double()
    found = ends(symmetric(eigenvalues, 1), 8)
    for end in (found.largest, found.smallest):
        assert end.error > 0.01
        assert abs(end.value) < 1


def test_with_a_basis_lanczos_does_not_repeat_eigenvalues() -> None:
    # The large end is found first; without orthogonalization it is found again instead of the small end.
    eigenvalues = torch.cat([10.0 ** torch.linspace(6, 0, 29), torch.tensor([-1e-2])]).double()
    matrix = symmetric(eigenvalues, 2)
    exact = torch.linalg.eigvalsh(matrix)[0].item()
    assert ends(matrix, 30).smallest.value == pytest.approx(exact, rel=1e-3)
    assert abs(ends(matrix, 30, keep_basis=False).smallest.value - exact) > 1e-2


@pytest.mark.parametrize("factor", [0.0, -3.0])
def test_an_invariant_subspace_ends_the_iteration(factor: float) -> None:
    calls = 0

    def product(vector: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return factor * vector

    found = spectrum_ends(product, torch.ones(50), 20)
    assert calls == found.iterations == 1
    assert found.largest.value == pytest.approx(factor)
    assert found.largest.error < 1e-5


def test_equal_seeds_give_equal_results_and_the_start_is_unchanged() -> None:
    matrix = symmetric(torch.linspace(-1, 3, 60).double(), 0)
    assert ends(matrix, 9, seed=3) == ends(matrix, 9, seed=3)
    assert ends(matrix, 9, seed=3) != ends(matrix, 9, seed=4)
    start = random_start([torch.zeros(2, 3), torch.zeros(54)], 3)
    before = start.clone()
    spectrum_ends(lambda vector: matrix.float() @ vector, start, 9)
    assert torch.equal(start, before)
    assert random_start([torch.zeros(4, dtype=torch.bfloat16)], 0).dtype == torch.float32


def test_smoothness_is_the_end_farther_from_zero_with_its_error() -> None:
    near, far = Eigenvalue(2.0, 0.1), Eigenvalue(-5.0, 0.2)
    assert Spectrum(near, far, 3).smoothness == Eigenvalue(5.0, 0.2)
    assert Spectrum(near, far, 3).concavity == 5.0
    assert Spectrum(far, near, 3).concavity == 0.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_product_that_is_not_finite_is_an_error(bad: float) -> None:
    with pytest.raises(StayalignedError, match="product 1 with the Hessian is not finite"):
        spectrum_ends(lambda vector: vector * bad, torch.ones(4), 3)


def parts_of(weights: list[Tensor]) -> list[object]:
    """Return a loss in three parts: coupled, linear, and of one weight."""
    a, b, _ = weights
    return [lambda: (a.sin() @ b).square().sum() + (a**3).sum(), b.sum, lambda: b.exp().sum()]


def test_the_product_is_that_of_the_dense_hessian_summed_over_the_parts() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 3), (3,), (4,)]
    weights = [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]

    def whole(flat: Tensor) -> Tensor:
        pieces = [piece.view(shape) for piece, shape in zip(flat.split([6, 3, 4]), shapes, strict=True)]
        return torch.stack([part() for part in parts_of(pieces)]).sum()  # type: ignore[operator]

    flat = torch.cat([weight.detach().flatten() for weight in weights])
    dense = torch.autograd.functional.hessian(whole, flat)
    for _ in range(3):
        vector = torch.randn(13, generator=generator, dtype=torch.float64)
        found = hessian_product(parts_of(weights), weights, vector)  # type: ignore[arg-type]
        torch.testing.assert_close(found, dense @ vector)
    assert all(weight.grad is None for weight in weights)
    linear = hessian_product([weights[1].sum], weights[1:2], torch.ones(3, dtype=torch.float64))
    assert torch.equal(linear, torch.zeros(3, dtype=torch.float64))
