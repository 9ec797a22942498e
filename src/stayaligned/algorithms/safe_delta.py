"""Safe Delta's mathematics (arXiv 2505.12038): which entries of a full update to keep, and what makes up for them.

An entry δ of column j costs δ²/U_jj² of safety, by the optimal brain surgeon with the Hessian H = (2/N) Σ x xᵀ of the
layer's inputs on N safety rows, and H⁻¹ = UᵀU with U upper triangular. Its utility is δ², so that the cheapest columns
come first, until the budget is used up. Every change is made up for in the columns after it, in SparseGPT's order.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING or find_spec("jaxtyping"):  # shapes are checked where jaxtyping is installed: in tests
    from jaxtyping import Bool, Float

_UNIT = 4096.0
"""Width of the layers that the strength is stated for."""
_NEVER = 0.15
"""Share of a block's entries, the most expensive ones, that is never kept."""


def inverse_factor(hessian: Float[Tensor, "n n"], damping: float = 0.01) -> Float[Tensor, "n n"]:
    """Compute U of (H + damping · mean(diag H) · I)⁻¹ = UᵀU; an input that is always zero gets the curvature 1."""
    damped = hessian.clone()
    diagonal = damped.diagonal()
    diagonal[diagonal == 0] = 1.0
    diagonal += damping * diagonal.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True)


def select_entries(
    delta: Float[Tensor, "rows columns"], diagonal: Float[Tensor, " columns"], strength: float
) -> Bool[Tensor, "rows columns"]:
    """Return the entries of a block to keep: the cheapest columns' first, while their costs are within the budget.

    Args:
        delta: the block of W_ft - W.
        diagonal: U_jj of its columns.
        strength: s; the budget is s · mean(1/U_jj²) for 4096 × 4096 entries, and in proportion for others.
    """
    cost = diagonal.square().reciprocal()
    order = cost.argsort(stable=True)
    spent = (delta.square() * cost)[:, order].T.reshape(-1).double()
    budget = strength * cost.double().mean() * delta.numel() / _UNIT**2
    kept = spent.cumsum(0) <= budget
    kept[delta.numel() - int(_NEVER * delta.numel()) :] = False
    mask = torch.empty_like(delta, dtype=torch.bool)
    mask[:, order] = kept.view(len(order), -1).T
    return mask


def safe_delta(
    aligned: Float[Tensor, "out_features in_features"],
    finetuned: Float[Tensor, "out_features in_features"],
    factor: Float[Tensor, "in_features in_features"],
    strength: float,
    *,
    block: int = 2048,
    group: int = 4,
) -> Float[Tensor, "out_features in_features"]:
    """Return the aligned weight with the kept entries of the fine-tuned one, and the others compensated.

    Args:
        aligned: W.
        finetuned: W_ft.
        factor: U of `inverse_factor`.
        strength: s; 0 gives W.
        block: number of columns that share a budget.
        group: number of columns that are compensated for at once.
    """
    weight = aligned.clone()
    for start in range(0, weight.shape[1], block):
        end = min(start + block, weight.shape[1])
        wanted = finetuned[:, start:end]
        mask = select_entries(wanted - weight[:, start:end], factor.diagonal()[start:end], strength)
        compensate_(weight, wanted, mask, factor, start, group=group)
    return weight


def compensate_(
    weight: Float[Tensor, "rows in_features"],
    wanted: Float[Tensor, "rows columns"],
    mask: Bool[Tensor, "rows columns"],
    factor: Float[Tensor, "in_features in_features"],
    start: int,
    *,
    group: int,
) -> None:
    """Set entries of a block of columns to the wanted ones, and change the columns after each group to make up for it.

    Args:
        weight: the weight, changed in place.
        wanted: the wanted entries.
        mask: which of them to set.
        factor: U of `inverse_factor`.
        start: index of the block's first column.
        group: number of columns that are set before the next ones are changed.
    """
    end = start + wanted.shape[1]
    errors = torch.zeros_like(wanted)
    for first in range(start, end, group):
        last = min(first + group, end)
        inside = slice(first - start, last - start)
        chosen = torch.where(mask[:, inside], wanted[:, inside], weight[:, first:last])
        errors[:, inside] = (weight[:, first:last] - chosen) / factor.diagonal()[first:last]
        weight[:, first:last] = chosen
        weight[:, last:end] -= errors[:, inside] @ factor[first:last, last:end]
    weight[:, end:] -= errors @ factor[start:end, end:]
