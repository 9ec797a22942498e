"""Safe LoRA's operators against the dense matrices that they do not form."""

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stayaligned.algorithms import alignment_delta
from stayaligned.algorithms.alignment_delta import (
    AlignmentSubspace,
    FullDelta,
    TruncatedDelta,
    alignment_subspace,
    frobenius_norm,
    leading_triplets,
    measure_tail,
    random_frame,
    random_subspace,
)
from stayaligned.algorithms.safe_lora import (
    ComplementOperator,
    LoraFactors,
    Orthogonal,
    RandomlyRotated,
    ScaledGram,
    compare,
    scale_update,
    select_all,
    select_below,
    select_lowest,
    update_norm,
)
from stayaligned.core.errors import StayalignedError
from support.factors import dense

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


def scaled_gram(v: torch.Tensor) -> ScaledGram:
    return ScaledGram(FullDelta.from_matrix(v))


def shrinkage(before: LoraFactors, after: LoraFactors) -> float:
    return compare(before, after).shrinkage


def operators(v: torch.Tensor) -> list[Any]:
    subspace = alignment_subspace(v, rank=2)
    return [
        scaled_gram(v),
        Orthogonal(subspace),
        *(ComplementOperator(subspace, side) for side in ("left", "right", "both")),
    ]


def cosine(x: torch.Tensor, y: torch.Tensor) -> float:
    return float((x * y).sum() / (x.norm() * y.norm()))


@given(shapes)
def test_scaled_gram_equals_the_dense_c(shape: tuple[int, int, int, int]) -> None:
    v, factors = problem(shape)
    c = v @ v.T / torch.linalg.norm(v)
    torch.testing.assert_close(dense(scaled_gram(v)(factors)), c @ dense(factors), rtol=1e-10, atol=1e-10)


@given(shapes)
def test_projectors_equal_their_dense_forms(shape: tuple[int, int, int, int]) -> None:
    v, factors = problem(shape)
    subspace = alignment_subspace(v, rank=2)
    left, right = subspace.left @ subspace.left.T, subspace.right @ subspace.right.T
    eye_left, eye_right = torch.eye(len(left), dtype=F64), torch.eye(len(right), dtype=F64)
    update = dense(factors)
    for operator, expected in (
        (Orthogonal(subspace), left @ update),
        (ComplementOperator(subspace, "left"), (eye_left - left) @ update),
        (ComplementOperator(subspace, "right"), update @ (eye_right - right)),
        (ComplementOperator(subspace, "both"), (eye_left - left) @ update @ (eye_right - right)),
    ):
        torch.testing.assert_close(dense(operator(factors)), expected, rtol=1e-10, atol=1e-10)


@given(shapes)
def test_projectors_are_idempotent_and_do_not_increase_the_norm(shape: tuple[int, int, int, int]) -> None:
    v, factors = problem(shape)
    for operator in operators(v)[1:]:
        once = operator(factors)
        torch.testing.assert_close(dense(operator(once)), dense(once), rtol=1e-9, atol=1e-9)
        assert shrinkage(factors, once) <= 1 + 1e-12


def test_the_papers_c_is_not_idempotent() -> None:
    v, factors = problem((8, 8, 2, 1))
    once = scaled_gram(v)(factors)
    assert not torch.allclose(dense(scaled_gram(v)(once)), dense(once), rtol=0.1)


@given(shapes, st.floats(-50, 50).filter(lambda c: abs(c) > 0.01))
def test_scale_law_c_of_cv_is_abs_c_times_c_of_v(shape: tuple[int, int, int, int], c: float) -> None:
    v, factors = problem(shape)
    torch.testing.assert_close(
        dense(scaled_gram(c * v)(factors)), abs(c) * dense(scaled_gram(v)(factors)), rtol=1e-9, atol=1e-9
    )
    before, after = scaled_gram(v)(factors), scaled_gram(c * v)(factors)
    assert compare(factors, after).similarity == pytest.approx(compare(factors, before).similarity, abs=1e-9)


@given(shapes)
def test_gram_similarity_and_norm_equal_the_flattened_ones(shape: tuple[int, int, int, int]) -> None:
    v, factors = problem(shape)
    assert update_norm(factors) == pytest.approx(float(dense(factors).norm()), rel=1e-9)
    for operator in operators(v):
        after = operator(factors)
        if (norm := float(dense(after).norm())) > 1e-6 * update_norm(factors):
            assert compare(factors, after).similarity == pytest.approx(cosine(dense(factors), dense(after)), abs=1e-8)
            assert shrinkage(factors, after) == pytest.approx(norm / update_norm(factors), rel=1e-6)


@given(shapes)
def test_the_similarity_to_the_image_under_c_is_between_0_and_1(shape: tuple[int, int, int, int]) -> None:
    v, factors = problem(shape)  # C is positive semi-definite
    assert 0 <= compare(factors, scaled_gram(v)(factors)).similarity <= 1


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
def test_a_scaled_update_has_the_scaled_norm(shape: tuple[int, int, int, int], factor: float) -> None:
    _, factors = problem(shape)
    assert update_norm(scale_update(factors, factor)) == pytest.approx(factor * update_norm(factors), rel=1e-9)


def test_a_zero_update_has_similarity_0_and_keeps_its_norm() -> None:
    v, factors = problem((5, 4, 2, 0))
    zero = scale_update(factors, 0.0)
    assert compare(zero, scaled_gram(v)(zero)).similarity == 0
    assert compare(factors, zero).similarity == 0
    assert shrinkage(zero, zero) == 1
    assert shrinkage(factors, zero) == 0


def test_for_v_zero_c_is_an_error_and_the_complement_is_the_identity() -> None:
    v, factors = problem((5, 4, 2, 0))
    with pytest.raises(ValueError, match="undefined for V = 0"):
        scaled_gram(v * 0)(factors)
    subspace = alignment_subspace(v * 0, rank=2)
    assert (subspace.rank, subspace.captured_energy) == (0, 0.0)
    torch.testing.assert_close(dense(ComplementOperator(subspace)(factors)), dense(factors))


def test_energy_selects_the_fewest_directions_that_capture_it() -> None:
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
    monkeypatch.setattr(alignment_delta, "_EXACT_SVD_UP_TO", 50)
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
    like = alignment_subspace(v, rank=rank)
    found, again = (random_subspace(FullDelta.from_matrix(v), like, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(found.left, again.left)
    for basis in (found.left, found.right):
        torch.testing.assert_close(basis.T @ basis, torch.eye(rank, dtype=F64), atol=1e-10, rtol=0)
    assert 0 <= found.captured_energy <= alignment_subspace(v, rank=rank).captured_energy + 1e-9


def test_norms_accumulate_in_fp64_and_in_blocks() -> None:
    matrix = torch.full((3000, 1000), 1e-3)
    assert frobenius_norm(matrix) == pytest.approx(float(torch.tensor(1e-3)) * math.sqrt(3e6), rel=1e-12)
    assert frobenius_norm(torch.zeros(0, 3)) == 0


def test_grams_in_fp64_are_exact_where_fp32_cosines_are_not() -> None:
    _, before = problem((600, 600, 8, 4), torch.float32)
    after = before._replace(b=before.b * 3)
    assert compare(before, after).similarity == pytest.approx(1, abs=1e-12)


similarities = st.dictionaries(st.text("abc", min_size=1, max_size=3), st.sampled_from([-1.0, 0.0, 0.2, 0.35, 1.0]))


@given(similarities, st.sampled_from([-1.0, 0.2, 0.35, 0.5, 1.0, 1.1]))
def test_select_below_is_strict(values: dict[str, float], threshold: float) -> None:
    assert select_below(threshold)(values) == {name for name in values if values[name] < threshold}


@given(similarities, st.integers(0, 12))
def test_select_lowest_selects_exactly_k_and_breaks_ties_by_name(values: dict[str, float], count: int) -> None:
    if count > len(values):
        with pytest.raises(ValueError, match="lowest"):
            select_lowest(count)(values)
        return
    chosen = select_lowest(count)(values)
    assert len(chosen) == count
    for selected, other in itertools.product(chosen, values.keys() - chosen):
        assert (values[selected], selected) < (values[other], other)


def test_select_all_selects_all() -> None:
    assert select_all({"x": 1.0, "y": 0.0}) == {"x", "y"}


def test_shapes_are_checked_in_tests() -> None:
    with pytest.raises(Exception, match="b"):
        scaled_gram(torch.zeros(3))


@settings(max_examples=10)
@given(shapes)
def test_half_precision_factors_are_multiplied_in_the_dtype_of_v(shape: tuple[int, int, int, int]) -> None:
    v, factors = problem(shape)
    halved = LoraFactors(factors.a.bfloat16(), factors.b.bfloat16(), factors.scaling)
    subspace: AlignmentSubspace = alignment_subspace(v.float(), rank=1)
    for operator in (scaled_gram(v.float()), Orthogonal(subspace), ComplementOperator(subspace, "left")):
        assert operator(halved).b.dtype == torch.float32


def truncated(v: torch.Tensor, k: int) -> TruncatedDelta:
    left, values, right = torch.linalg.svd(v, full_matrices=False)
    return TruncatedDelta(left[:, :k], values[:k], right[:k].T, float(v.norm()))


@given(shapes)
def test_the_full_spectrum_is_equivalent_to_v(shape: tuple[int, int, int, int]) -> None:
    v, factors = problem(shape)
    whole, spectrum = FullDelta.from_matrix(v), truncated(v, min(v.shape))
    assert spectrum.largest_missing is not None
    assert spectrum.largest_missing <= 1e-10 * whole.norm**2
    pairs: list[tuple[Any, Any]] = [(ScaledGram(whole), ScaledGram(spectrum))]
    pairs += [
        (kind(whole.subspace(rank=k)), kind(spectrum.subspace(rank=k)))
        for kind in (Orthogonal, ComplementOperator)
        for k in (1, 2, 99)
    ]
    for full, short in pairs:
        torch.testing.assert_close(dense(short(factors)), dense(full(factors)), rtol=1e-8, atol=1e-8)
    like = whole.subspace(rank=2)
    torch.testing.assert_close(spectrum.core(like.left, like.right), whole.core(like.left, like.right))


@given(shapes, st.integers(1, 6))
def test_the_truncation_error_bounds_the_true_one(shape: tuple[int, int, int, int], k: int) -> None:
    v, factors = problem(shape)
    exact = scaled_gram(v)
    short = ScaledGram(truncated(v, k))
    after = short(factors)
    bound = short.truncation_error(compare(factors, after).shrinkage)
    true = float((dense(exact(factors)) - dense(after)).norm()) / update_norm(after)
    assert bound is not None
    assert true <= bound * (1 + 1e-9) + 1e-9
    assert exact.truncation_error(1.0) is None


def spectrum_problem(shape: tuple[int, int, int, int], decay: float) -> tuple[torch.Tensor, LoraFactors]:
    """V with singular values i^-decay in random directions, and a random update."""
    v, factors = problem(shape)
    left, values, right = torch.linalg.svd(v, full_matrices=False)
    return left * torch.arange(1, len(values) + 1, dtype=F64) ** -decay @ right, factors


@given(shapes, st.integers(0, 12), st.floats(0, 2))
def test_the_bounds_hold_the_similarity_with_the_complete_v(
    shape: tuple[int, int, int, int], k: int, decay: float
) -> None:
    v, factors = spectrum_problem(shape, decay)
    whole, short = scaled_gram(v), leading_triplets(v, rank=max(1, k))
    update, norm = dense(factors), float(v.norm())
    image = v @ v.T @ update / norm
    exact = float((image * update).sum() / (image.norm() * update.norm()))
    assert compare(factors, whole(factors)).similarity == pytest.approx(exact, abs=1e-9)
    for one in (short, truncated(v, k) if k else short):  # with the known tail, and with the bound by the last value
        operator = ScaledGram(one)
        for form in (factors, update):
            found = compare(form, operator(form))
            bounds = operator.similarity_bounds(form, found)
            assert bounds is not None
            assert bounds[0] - 1e-9 <= exact <= bounds[1] + 1e-9
            assert bounds[0] <= found.similarity + 1e-9
    complete = ScaledGram(leading_triplets(v, rank=min(v.shape)))
    found = compare(factors, complete(factors))
    low, high = complete.similarity_bounds(factors, found) or (0, 1)
    assert high - low < 4e-6 / min(1.0, found.shrinkage * norm)  # fp32 rounding over ‖VVᵀΔW‖, for ‖ΔW‖ = ‖V‖₂ = 1
    assert whole.similarity_bounds(factors, compare(factors, whole(factors))) is None


@pytest.mark.parametrize(("decay", "rank"), [(0.0, 8), (0.3, 16), (1.0, 32)])
def test_the_bounds_hold_with_sampled_triplets(decay: float, rank: int) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (random_frame(size, 780, generator) for size in (800, 780))
    values = torch.arange(1, 781, dtype=F64) ** -decay
    v = (left * values) @ right.T
    stored = measure_tail(v.float(), leading_triplets(v.float(), rank=rank))
    assert stored.tail is not None
    e = v - stored.left.double() @ (stored.left.double().T @ v)
    true = float(torch.linalg.matrix_norm(e, 2))
    assert true <= stored.tail.largest * (1 + 1e-5)
    assert stored.tail.largest <= 1.2 * true
    assert float((e @ stored.right.double() * stored.values.double()).norm()) <= stored.tail.cross + 1e-5
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        b = torch.randn(800, 4, generator=generator, dtype=F64)
        b = (v @ v.T @ b if seed % 2 else b).float()  # along V's leading directions, or anywhere
        factors = LoraFactors(torch.randn(4, 780, generator=generator), b, 2.0)
        update = dense(factors)
        image = v @ (v.T @ update)
        exact = float((image * update).sum() / (image.norm() * update.norm()))
        operator = ScaledGram(stored)
        low, high = operator.similarity_bounds(factors, compare(factors, operator(factors))) or (0, 0)
        assert low <= exact <= high + 1e-12


def test_more_directions_than_stored_are_an_error_unless_the_stored_ones_capture_all_of_v() -> None:
    v, _ = problem((8, 6, 2, 1))
    short = truncated(v, 3)
    for settings_ in ({"rank": 4}, {"energy": 0.9999}):
        with pytest.raises(StayalignedError, match=r"3 directions with .* are stored"):
            short.subspace(**settings_)
    low = v[:, :2] @ torch.randn(2, 6, dtype=F64)
    assert truncated(low, 2).subspace(rank=5).rank == 2
    assert short.subspace(energy=0.1).rank == 1


@given(shapes)
def test_a_matrix_is_mapped_and_compared_like_its_factors(shape: tuple[int, int, int, int]) -> None:
    v, factors = problem(shape)
    update = dense(factors)
    for operator in operators(v):
        mapped = operator(update)
        torch.testing.assert_close(mapped, dense(operator(factors)), rtol=1e-9, atol=1e-9)
        # One is flattened in fp64, the other by Grams: if the result is almost zero, only the norm is comparable.
        one, other = compare(update, mapped), compare(factors, operator(factors))
        assert one.norm == pytest.approx(other.norm, rel=1e-9)
        assert one.shrinkage == pytest.approx(other.shrinkage, rel=1e-6, abs=1e-7)
        if one.shrinkage > 1e-6:
            assert one.similarity == pytest.approx(other.similarity, abs=1e-8)
    torch.testing.assert_close(scale_update(update, 0.5), 0.5 * update)


@given(shapes)
def test_a_rotated_multiple_of_the_identity_is_that_multiple(shape: tuple[int, int, int, int]) -> None:
    size, _, rank, seed = shape
    _, factors = problem((size, 5, rank, seed))
    operator = scaled_gram(3 * torch.linalg.qr(torch.randn(size, size, dtype=F64))[0])  # C = 9/(3√n) · I
    rotated = RandomlyRotated(operator, torch.Generator().manual_seed(seed))
    torch.testing.assert_close(rotated.map_outputs(factors.b), factors.b * 3 / math.sqrt(size), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("columns", [2, 9])
def test_a_rotated_c_has_the_spectrum_of_c_but_not_its_directions(columns: int) -> None:
    # With 2 columns R is not formed, with 9 of 10 it is; both must have the same distribution.
    generator = torch.Generator().manual_seed(0)
    v = torch.diag(torch.tensor([3.0] + [0.1] * 9, dtype=F64))
    operator = scaled_gram(v)
    rotated = RandomlyRotated(operator, generator)
    b = torch.eye(10, columns, dtype=F64)  # its first column is V's leading direction
    images = torch.stack([rotated.map_outputs(b) for _ in range(3000)])
    values = torch.linalg.eigvalsh(v @ v.T / v.norm())
    # E[R C Rᵀ] = tr(C)/n · I and E[(R C Rᵀ)²] = tr(C²)/n · I for a uniformly random R
    expected = b * float(values.sum() / 10)
    torch.testing.assert_close(images.mean(0), expected, atol=0.08, rtol=0)
    lengths = images.square().sum(1).mean(0)
    torch.testing.assert_close(lengths, torch.full_like(lengths, float(values.square().sum() / 10)), atol=0.08, rtol=0)
    assert float(operator.map_outputs(b)[0, 0]) == pytest.approx(float(values[-1]))
    # bᵀ R C Rᵀ b is a compression of C: symmetric, between its smallest and largest eigenvalue
    forms = b.T @ images
    torch.testing.assert_close(forms, forms.mT, atol=1e-9, rtol=0)
    spectrum = torch.linalg.eigvalsh(forms)
    assert float(spectrum.min()) >= float(values[0]) - 1e-9
    assert float(spectrum.max()) <= float(values[-1]) + 1e-9


@given(shapes)
def test_projectors_are_symmetric_and_c_is_positive(shape: tuple[int, int, int, int]) -> None:
    v, _ = problem(shape)
    eye_out, eye_in = (torch.eye(size, dtype=F64) for size in v.shape)
    for operator in operators(v):
        for matrix in (operator.map_outputs(eye_out), operator.map_inputs(eye_in)):
            torch.testing.assert_close(matrix, matrix.T, atol=1e-9, rtol=0)
            assert float(torch.linalg.eigvalsh(matrix).min()) >= -1e-9
