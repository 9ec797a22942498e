"""Safe LoRA's maths against the matrices it never forms."""

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stayaligned import projection
from stayaligned.projection import (
    AlignmentSubspace,
    Complement,
    LoraFactors,
    Orthogonal,
    ScaledGram,
    alignment_subspace,
    below,
    every,
    frobenius_norm,
    lowest,
    random_subspace,
    scaled,
    shrinkage,
    update_norm,
    update_similarity,
)

F64 = torch.float64
shapes = st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(1, 5), st.integers(0, 10_000))


def problem(shape: tuple[int, int, int, int], dtype: Any = F64) -> tuple[torch.Tensor, LoraFactors]:
    out, inner, rank, seed = shape
    generator = torch.Generator().manual_seed(seed)
    v, a, b = (
        torch.randn(*size, generator=generator, dtype=F64).to(dtype)
        for size in ((out, inner), (rank, inner), (out, rank))
    )
    return v, LoraFactors(a, b, 0.5 + seed % 7)


def dense(factors: LoraFactors) -> torch.Tensor:
    return factors.scaling * factors.b.double() @ factors.a.double()


def operators(v: torch.Tensor) -> list[Any]:
    subspace = alignment_subspace(v, rank=2)
    return [ScaledGram(v), Orthogonal(subspace), *(Complement(subspace, side) for side in ("left", "right", "both"))]


def cosine(x: torch.Tensor, y: torch.Tensor) -> float:
    return float((x * y).sum() / (x.norm() * y.norm()))


@given(shapes)
def test_scaled_gram_equals_the_dense_c(shape: tuple[int, int, int, int]) -> None:
    v, factors = problem(shape)
    c = v @ v.T / torch.linalg.norm(v)
    torch.testing.assert_close(dense(ScaledGram(v)(factors)), c @ dense(factors), rtol=1e-10, atol=1e-10)


@given(shapes)
def test_projectors_equal_their_dense_forms(shape: tuple[int, int, int, int]) -> None:
    v, factors = problem(shape)
    subspace = alignment_subspace(v, rank=2)
    left, right = subspace.left @ subspace.left.T, subspace.right @ subspace.right.T
    eye_left, eye_right = torch.eye(len(left), dtype=F64), torch.eye(len(right), dtype=F64)
    update = dense(factors)
    for operator, expected in (
        (Orthogonal(subspace), left @ update),
        (Complement(subspace, "left"), (eye_left - left) @ update),
        (Complement(subspace, "right"), update @ (eye_right - right)),
        (Complement(subspace, "both"), (eye_left - left) @ update @ (eye_right - right)),
    ):
        torch.testing.assert_close(dense(operator(factors)), expected, rtol=1e-10, atol=1e-10)


@given(shapes)
def test_projectors_are_idempotent_and_never_lengthen(shape: tuple[int, int, int, int]) -> None:
    v, factors = problem(shape)
    for operator in operators(v)[1:]:
        once = operator(factors)
        torch.testing.assert_close(dense(operator(once)), dense(once), rtol=1e-9, atol=1e-9)
        assert shrinkage(factors, once) <= 1 + 1e-12


def test_the_papers_c_is_not_idempotent() -> None:
    v, factors = problem((8, 8, 2, 1))
    once = ScaledGram(v)(factors)
    assert not torch.allclose(dense(ScaledGram(v)(once)), dense(once), rtol=0.1)


@given(shapes, st.floats(-50, 50).filter(lambda c: abs(c) > 0.01))
def test_scale_law_c_of_cv_is_abs_c_times_c_of_v(shape: tuple[int, int, int, int], c: float) -> None:
    v, factors = problem(shape)
    torch.testing.assert_close(
        dense(ScaledGram(c * v)(factors)), abs(c) * dense(ScaledGram(v)(factors)), rtol=1e-9, atol=1e-9
    )
    before, after = ScaledGram(v)(factors), ScaledGram(c * v)(factors)
    assert update_similarity(factors, after) == pytest.approx(update_similarity(factors, before), abs=1e-9)


@given(shapes)
def test_gram_similarity_and_norm_equal_the_flattened_ones(shape: tuple[int, int, int, int]) -> None:
    v, factors = problem(shape)
    assert update_norm(factors) == pytest.approx(float(dense(factors).norm()), rel=1e-9)
    for operator in operators(v):
        after = operator(factors)
        if (norm := float(dense(after).norm())) > 1e-6 * update_norm(factors):
            assert update_similarity(factors, after) == pytest.approx(cosine(dense(factors), dense(after)), abs=1e-8)
            assert shrinkage(factors, after) == pytest.approx(norm / update_norm(factors), rel=1e-6)


@given(shapes)
def test_similarity_to_the_papers_image_lies_in_0_to_1(shape: tuple[int, int, int, int]) -> None:
    v, factors = problem(shape)  # C is positive semi-definite
    assert 0 <= update_similarity(factors, ScaledGram(v)(factors)) <= 1


@given(shapes)
def test_every_operator_keeps_rank_and_scaling(shape: tuple[int, int, int, int]) -> None:
    v, factors = problem(shape)
    for operator in operators(v):
        after = operator(factors)
        assert (after.a.shape, after.b.shape, after.scaling) == (factors.a.shape, factors.b.shape, factors.scaling)


@given(shapes)
def test_full_rank_projector_is_the_identity_on_square_v(shape: tuple[int, int, int, int]) -> None:
    size, _, rank, seed = shape
    v, factors = problem((size, size, rank, seed))
    # the paper's "exact" operator V(VᵀV)⁻¹Vᵀ is this one
    torch.testing.assert_close(dense(Orthogonal(alignment_subspace(v, rank=size))(factors)), dense(factors))


@given(shapes, st.floats(0, 1))
def test_controls_scale_exactly(shape: tuple[int, int, int, int], factor: float) -> None:
    _, factors = problem(shape)
    assert update_norm(scaled(factors, factor)) == pytest.approx(factor * update_norm(factors), rel=1e-9)


def test_a_zero_update_has_similarity_0_and_keeps_its_norm() -> None:
    v, factors = problem((5, 4, 2, 0))
    zero = scaled(factors, 0.0)
    assert update_similarity(zero, ScaledGram(v)(zero)) == 0
    assert update_similarity(factors, zero) == 0
    assert shrinkage(zero, zero) == 1
    assert shrinkage(factors, zero) == 0


def test_v_of_zero_is_refused_by_c_and_leaves_the_complement_the_identity() -> None:
    v, factors = problem((5, 4, 2, 0))
    with pytest.raises(ValueError, match="undefined for V = 0"):
        ScaledGram(v * 0)(factors)
    subspace = alignment_subspace(v * 0, rank=2)
    assert (subspace.rank, subspace.captured_energy) == (0, 0.0)
    torch.testing.assert_close(dense(Complement(subspace)(factors)), dense(factors))


def test_energy_takes_the_fewest_directions_that_hold_it() -> None:
    values = torch.tensor([4.0, 2.0, 1.0, 0.5], dtype=F64)
    u, w = (torch.linalg.qr(torch.randn(size, 4, dtype=F64))[0] for size in (9, 7))
    v = u @ torch.diag(values) @ w.T
    shares = (values.square().cumsum(0) / values.square().sum()).tolist()
    for k, share in enumerate(shares, start=1):
        subspace = alignment_subspace(v, energy=share - 1e-6)
        assert subspace.rank == k
        assert subspace.captured_energy == pytest.approx(share)
    assert alignment_subspace(v, rank=6).rank == 4  # directions with singular value zero are arbitrary


@pytest.mark.parametrize("settings", [{}, {"rank": 1, "energy": 0.5}, {"rank": 0}, {"energy": 0.0}, {"energy": 1.1}])
def test_subspace_size_is_given_once_and_in_range(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"exactly one|at least 1"):
        alignment_subspace(torch.eye(3), **settings)


def test_sampled_svd_finds_the_subspace_and_leaves_the_random_state(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    u, w = (torch.linalg.qr(torch.randn(size, 40, generator=generator))[0] for size in (300, 200))
    v = u @ torch.diag(0.8 ** torch.arange(40)) @ w.T
    exact = alignment_subspace(v, rank=8)
    monkeypatch.setattr(projection, "_EXACT_SVD_UP_TO", 50)
    state = torch.get_rng_state()
    found, again = alignment_subspace(v, rank=8), alignment_subspace(v, rank=8)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(found.left, again.left)
    for one, other in ((found.left, exact.left), (found.right, exact.right)):
        torch.testing.assert_close(one @ one.T, other @ other.T, atol=1e-5, rtol=0)
    by_energy = alignment_subspace(v, energy=0.99)
    assert by_energy.captured_energy >= 0.99 > alignment_subspace(v, rank=by_energy.rank - 1).captured_energy


@given(shapes)
def test_random_directions_are_orthonormal_and_reproducible(shape: tuple[int, int, int, int]) -> None:
    v, _ = problem(shape)
    rank = min(2, *v.shape)
    found, again = (random_subspace(v, rank, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(found.left, again.left)
    for basis in (found.left, found.right):
        torch.testing.assert_close(basis.T @ basis, torch.eye(rank, dtype=F64), atol=1e-10, rtol=0)
    assert 0 <= found.captured_energy <= alignment_subspace(v, rank=rank).captured_energy + 1e-9


def test_norms_accumulate_in_fp64_and_in_blocks() -> None:
    matrix = torch.full((3000, 1000), 1e-3)
    assert frobenius_norm(matrix) == pytest.approx(float(torch.tensor(1e-3)) * math.sqrt(3e6), rel=1e-12)
    assert frobenius_norm(torch.zeros(0, 3)) == 0


def test_fp64_grams_keep_what_fp32_cosines_lose() -> None:
    _, before = problem((600, 600, 8, 4), torch.float32)
    after = before._replace(b=before.b * 3)
    assert update_similarity(before, after) == pytest.approx(1, abs=1e-12)


similarities = st.dictionaries(st.text("abc", min_size=1, max_size=3), st.sampled_from([-1.0, 0.0, 0.2, 0.35, 1.0]))


@given(similarities, st.sampled_from([-1.0, 0.2, 0.35, 0.5, 1.0, 1.1]))
def test_below_is_strict(values: dict[str, float], threshold: float) -> None:
    assert below(threshold)(values) == {name for name in values if values[name] < threshold}


@given(similarities, st.integers(0, 12))
def test_lowest_takes_exactly_k_and_breaks_ties_by_name(values: dict[str, float], count: int) -> None:
    if count > len(values):
        with pytest.raises(ValueError, match="lowest"):
            lowest(count)(values)
        return
    chosen = lowest(count)(values)
    assert len(chosen) == count
    for kept, left in itertools.product(chosen, values.keys() - chosen):
        assert (values[kept], kept) < (values[left], left)


def test_every_takes_all() -> None:
    assert every({"x": 1.0, "y": 0.0}) == {"x", "y"}


def test_shapes_are_checked_in_tests() -> None:
    with pytest.raises(Exception, match="b"):
        ScaledGram(torch.zeros(3))


@settings(max_examples=10)
@given(shapes)
def test_half_precision_factors_are_multiplied_in_the_dtype_of_v(shape: tuple[int, int, int, int]) -> None:
    v, factors = problem(shape)
    halved = LoraFactors(factors.a.bfloat16(), factors.b.bfloat16(), factors.scaling)
    subspace: AlignmentSubspace = alignment_subspace(v.float(), rank=1)
    for operator in (ScaledGram(v.float()), Orthogonal(subspace), Complement(subspace, "left")):
        assert operator(halved).b.dtype == torch.float32
