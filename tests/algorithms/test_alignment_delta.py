"""V's leading triplets: the error bound of a truncated V, and equal results in several threads."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stayaligned.algorithms.alignment_delta import FullDelta, leading_triplets
from stayaligned.algorithms.safe_lora import LoraFactors, ScaledGram, compare, update_norm
from support.factors import dense


def update(v: torch.Tensor, seed: int) -> LoraFactors:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(3, v.shape[1], generator=generator), torch.randn(v.shape[0], 3, generator=generator)
    return LoraFactors(a.to(v.dtype), b.to(v.dtype), 2.0)


@st.composite
def spectra(draw: st.DrawFn) -> tuple[torch.Tensor, int]:
    out, inner = draw(st.integers(2, 24)), draw(st.integers(2, 24))
    values = draw(st.lists(st.floats(1e-3, 1e3), min_size=min(out, inner), max_size=min(out, inner)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    left, right = (
        torch.linalg.qr(torch.randn(n, len(values), generator=generator, dtype=torch.float64)).Q for n in (out, inner)
    )
    return (left * torch.tensor(values, dtype=torch.float64)) @ right.T, draw(st.integers(1, len(values)))


@given(spectra(), st.integers(0, 100))
@settings(max_examples=200)
def test_the_truncation_error_bounds_the_true_error_for_any_spectrum(
    problem: tuple[torch.Tensor, int], seed: int
) -> None:
    v, k = problem
    check_truncation(v, k, update(v, seed), slack=1e-9)


def test_the_truncation_error_bounds_the_true_error_of_a_sampled_v() -> None:
    v = torch.randn(800, 900, generator=torch.Generator().manual_seed(0))  # singular values close together
    stored = leading_triplets(v, rank=32)
    c, c_stored = v @ v.T, (stored.left * stored.values.square()) @ stored.left.T
    worst = torch.linalg.eigh(c.double() - c_stored.double()).eigenvectors[:, [0, -1]]
    for column in (0, 1):
        factors = LoraFactors(torch.ones(1, 900), worst[:, [column]].float(), 1.0)
        check_truncation(v, 32, factors, slack=2e-2)
    torch.testing.assert_close(stored.values, torch.linalg.svdvals(v)[:32], rtol=1e-2, atol=0)


def check_truncation(v: torch.Tensor, k: int, factors: LoraFactors, slack: float) -> None:
    whole, stored = ScaledGram(FullDelta.from_matrix(v.double())), ScaledGram(leading_triplets(v, rank=k))
    after: Any = stored(factors)
    bound = stored.truncation_error(compare(factors, after).shrinkage)
    exact: Any = whole(LoraFactors(factors.a.double(), factors.b.double(), factors.scaling))
    true = float((dense(exact) - dense(after)).norm())
    assert bound is not None
    # In fp64 the rounding error is relative to C, not to the bound.
    assert true <= bound * update_norm(after) * (1 + slack) + 1e-12 * v.double().norm() * update_norm(factors)


def test_several_threads_find_the_same_as_one_and_do_not_use_the_global_generator() -> None:
    matrices = [torch.randn(780, 800, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    state = torch.random.get_rng_state()
    alone = [leading_triplets(v, rank=3) for v in matrices]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda v: leading_triplets(v, rank=3), matrices))
    assert torch.equal(torch.random.get_rng_state(), state)
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one.values, other.values, rtol=1e-5, atol=0)
        torch.testing.assert_close(one.left, other.left, rtol=0, atol=1e-4)
