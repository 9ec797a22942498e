"""Losses of the training defenses on label tokens, and what two gradients make of each other.

Position t of the logits predicts label t + 1; labels of -100 are not counted. Sums are over label tokens, in fp32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

IGNORED = -100
_LEAST_WEIGHT = 1e-3
"""Least weight of a token in `constrained_loss`, as in the published code."""


def reference_kl(logits: Tensor, reference: Tensor, labels: Tensor, count: Tensor | int | None = None) -> Tensor:
    """Compute Σ over label tokens of KL(reference ‖ model), divided by `count` or by their number.

    Args:
        logits: the model's logits, (batch, length, vocabulary).
        reference: the reference's logits, of the same shape.
        labels: (batch, length).
        count: number of label tokens to divide by, if the batch is a part of a step.
    """
    predicted = labels[:, 1:] != IGNORED
    ours = logits[:, :-1][predicted].float().log_softmax(-1)
    theirs = reference[:, :-1][predicted].float().log_softmax(-1)
    total = nn.functional.kl_div(ours, theirs, log_target=True, reduction="sum")
    return total / (predicted.sum() if count is None else count)


def logit_distance(logits: Tensor, reference: Tensor, labels: Tensor) -> Tensor:
    """Compute Σ over label tokens of the mean over the vocabulary of (z − z_reference)² (arXiv 2004.07211)."""
    predicted = labels[:, 1:] != IGNORED
    return (logits[:, :-1][predicted].float() - reference[:, :-1][predicted].float()).square().mean(-1).sum()


def label_log_probabilities(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute log p of each label, (batch, length − 1); 0 where there is none."""
    predicted = labels[:, 1:]
    chosen = logits[:, :-1].float().log_softmax(-1).gather(-1, predicted.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return torch.where(predicted == IGNORED, 0.0, chosen)


@dataclass(frozen=True, slots=True)
class TokenStrengths:
    """β of each label token of a row, by its position among them."""

    first: float
    early: float
    """β of the tokens after the first, up to `early_tokens`."""
    later: float
    early_tokens: int

    def of(self, labels: Tensor) -> Tensor:
        """Return β of every position that predicts a label, (batch, length − 1)."""
        position = (labels[:, 1:] != IGNORED).cumsum(-1)
        strengths = torch.where(position <= self.early_tokens, self.early, self.later)
        return torch.where((position <= 1) & (self.early_tokens > 0), self.first, strengths)


def constrained_loss(logits: Tensor, reference: Tensor, labels: Tensor, strengths: TokenStrengths) -> Tensor:
    """Compute Σ over label tokens of −w·log p with w = 2(1 − σ(β(log p − log p_reference))), w held constant.

    Its gradient is that of Σ −(2/β)·log σ(β·(log p − log p_reference)) (arXiv 2406.05946, equation 3), except that w
    is at least 0.001, as in the published code.
    """
    ours = label_log_probabilities(logits, labels)
    with torch.no_grad():
        gained = ours - label_log_probabilities(reference, labels)
        weights = (2 * (1 - torch.sigmoid(strengths.of(labels) * gained))).clamp(min=_LEAST_WEIGHT)
    return -(weights * ours).sum()


def remove_conflict_(gradient: Sequence[Tensor], alignment: Sequence[Tensor]) -> bool:
    """Remove from a gradient, in place, its component against the alignment gradient; return whether there was one.

    g ← g − (g·g_s / ‖g_s‖²) g_s if g·g_s < 0, where g and g_s are the gradients of all weights as one vector
    (arXiv 2508.07172, equations 3 and 4). Products accumulate in fp64.
    """
    inner = torch.stack([(g.double() * a.double()).sum() for g, a in zip(gradient, alignment, strict=True)]).sum()
    square = torch.stack([a.double().square().sum() for a in alignment]).sum()
    if not inner < 0:
        return False
    for g, a in zip(gradient, alignment, strict=True):
        g.sub_((a.double() * (inner / square)).to(g.dtype))
    return True


def weighted_drift(
    weights: Mapping[str, Tensor], start: Mapping[str, Tensor], importance: Mapping[str, Tensor]
) -> Tensor:
    """Compute ½ Σ F (w − w₀)² over all weights (Kirkpatrick and others, arXiv 1612.00796, equation 3)."""
    terms = [(importance[name] * (weight - start[name]).square()).sum() for name, weight in weights.items()]
    return 0.5 * torch.stack(terms).sum()


def outside_norm(a: Tensor, b: Tensor, root: Tensor) -> Tensor:
    """Compute ‖(I − RRᵀ)BA‖² from r × r products: tr((MᵀM)(AAᵀ)) with M = B − R(RᵀB), in at least fp32."""
    a, b = (factor if factor.dtype == torch.float64 else factor.float() for factor in (a, b))
    root = root.to(b)
    outside = b - root @ (root.T @ b)
    return ((outside.T @ outside) * (a @ a.T)).sum()
