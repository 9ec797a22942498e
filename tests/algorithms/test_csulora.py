"""CSULoRA's closed form, compared with the objective that it minimizes."""

import pytest
import torch

from stayaligned.algorithms.alignment_delta import AlignmentSubspace
from stayaligned.algorithms.csulora import BlockAttenuation, block_energies
from stayaligned.algorithms.safe_lora import LoraFactors

OUT, IN, RANK = 12, 9, 3


@pytest.fixture
def directions() -> AlignmentSubspace:
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(size, 4).double()).Q for size in (OUT, IN))
    return AlignmentSubspace(left, right, 1.0)


@pytest.fixture
def factors() -> LoraFactors:
    torch.manual_seed(1)
    return LoraFactors(torch.randn(RANK, IN).double(), torch.randn(OUT, RANK).double(), 0.5)


def dense(update: LoraFactors) -> torch.Tensor:
    return update.scaling * update.b @ update.a


def blocks(matrix: torch.Tensor, directions: AlignmentSubspace) -> list[torch.Tensor]:
    left, right = (side @ side.T for side in (directions.left, directions.right))
    aligned, off = left @ matrix @ right, matrix - left @ matrix - matrix @ right + left @ matrix @ right
    return [aligned, matrix - aligned - off, off]


def test_the_result_minimizes_the_penalized_distance(directions: AlignmentSubspace, factors: LoraFactors) -> None:
    partial, off = 0.7, 4.0
    result = BlockAttenuation(directions, partial, off, relative=False)(factors)
    assert isinstance(result, LoraFactors)
    matrix = dense(result).requires_grad_()
    _, middle, outside = blocks(matrix, directions)
    cost = (matrix - dense(factors)).square().sum() + partial * middle.square().sum() + off * outside.square().sum()
    cost.backward()
    assert matrix.grad is not None
    assert matrix.grad.abs().max() < 1e-12  # the objective is strictly convex: its only minimum
    assert result.a.shape[0] == 2 * RANK


def test_factors_and_matrices_give_the_same_and_each_penalty_grows_with_its_block(
    directions: AlignmentSubspace, factors: LoraFactors
) -> None:
    operator = BlockAttenuation(directions, 2.0, 3.0, relative=True)
    result, full = operator(factors), operator(dense(factors))
    assert isinstance(result, LoraFactors)
    assert torch.allclose(dense(result), full, atol=1e-12)
    parts = [float(part.square().sum()) for part in blocks(dense(factors), directions)]
    assert block_energies(factors, directions) == pytest.approx(parts)
    total = sum(parts)
    assert operator.kept(factors) == pytest.approx((1 / (1 + 2 * parts[1] / total), 1 / (1 + 3 * parts[2] / total)))


def test_limits_are_the_identity_and_the_projection_and_separable_weights_keep_the_rank(
    directions: AlignmentSubspace, factors: LoraFactors
) -> None:
    nothing = BlockAttenuation(directions, 0.0, 0.0, relative=True)(factors)
    assert isinstance(nothing, LoraFactors)
    assert nothing.a.shape == factors.a.shape
    assert torch.allclose(dense(nothing), dense(factors), atol=1e-12)
    separable = BlockAttenuation(directions, 1.0, 3.0, relative=False)(factors)  # 1/2 and 1/4 = (1/2)²
    assert isinstance(separable, LoraFactors)
    assert separable.a.shape == factors.a.shape
    expected = sum(part / scale for part, scale in zip(blocks(dense(factors), directions), (1, 2, 4), strict=True))
    assert torch.allclose(dense(separable), torch.as_tensor(expected), atol=1e-12)
    everything = BlockAttenuation(directions, 1e15, 1e15, relative=False)(factors)
    assert isinstance(everything, LoraFactors)
    assert torch.allclose(dense(everything), blocks(dense(factors), directions)[0], atol=1e-12)
