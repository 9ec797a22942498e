"""Safe Delta's selection and compensation, compared with the constrained least squares that they approximate."""

import torch

from stayaligned.algorithms.safe_delta import compensate_, inverse_factor, safe_delta, select_entries

ROWS, COLUMNS = 5, 12


def hessian() -> torch.Tensor:
    torch.manual_seed(0)
    x = torch.randn(COLUMNS, 40).double()
    return 2 * x @ x.T


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    aligned = torch.randn(ROWS, COLUMNS).double()
    return aligned, aligned + 0.1 * torch.randn(ROWS, COLUMNS).double()


def test_the_factor_is_the_cholesky_factor_of_the_damped_inverse_and_a_dead_input_is_no_error() -> None:
    h = hessian()
    h[3, :] = h[:, 3] = 0
    factor = inverse_factor(h)
    h[3, 3] = 1
    damped = h + 0.01 * h.diagonal().mean() * torch.eye(COLUMNS).double()
    assert torch.allclose(factor.T @ factor @ damped, torch.eye(COLUMNS).double(), atol=1e-9)
    assert torch.equal(factor, factor.triu())


def test_changing_the_first_columns_gives_the_least_damage_that_the_others_can_make_up_for() -> None:
    aligned, finetuned = pair()
    h, first = hessian(), 4
    mask = torch.zeros_like(aligned, dtype=torch.bool)
    mask[:, :first] = True
    weight = aligned.clone()
    compensate_(weight, finetuned, mask, inverse_factor(h, 0.0), 0, group=1)
    delta = (finetuned - aligned)[:, :first]
    others = -torch.linalg.solve(h[first:, first:], h[first:, :first] @ delta.T).T  # min (δ, e) H (δ, e)ᵀ over e
    assert torch.allclose(weight, torch.cat([finetuned[:, :first], aligned[:, first:] + others], dim=1), atol=1e-10)
    by_blocks = aligned.clone()
    for start in range(0, COLUMNS, 4):
        block = slice(start, start + 4)
        compensate_(by_blocks, finetuned[:, block], mask[:, block], inverse_factor(h, 0.0), start, group=1)
    assert torch.allclose(by_blocks, weight, atol=1e-12)


def test_the_cheapest_columns_come_first_within_the_budget_and_15_percent_never() -> None:
    delta = torch.ones(2, 20).double()
    diagonal = torch.linspace(2.0, 1.0, 20).double()  # the last column is the most expensive one
    cost = 1 / diagonal.square()
    strength = float(4096**2 * (2 * cost[:3].sum() + 1.5 * cost[3]) / (40 * cost.mean()))
    kept = select_entries(delta, diagonal, strength)
    assert kept[:, :3].all()
    assert kept[:, 3].tolist() == [True, False]
    assert not kept[:, 4:].any()
    everything = select_entries(delta, diagonal, 1e30)
    assert everything.sum() == 34
    assert not everything[:, 17:].any()


def test_without_a_budget_the_result_is_the_aligned_weight() -> None:
    aligned, finetuned = pair()
    factor = inverse_factor(hessian())
    assert torch.equal(safe_delta(aligned, finetuned, factor, 0.0), aligned)
    some, more = (safe_delta(aligned, finetuned, factor, s, block=6) for s in (1e4, 1e6))
    assert 0 < (some == finetuned).sum() < (more == finetuned).sum()
