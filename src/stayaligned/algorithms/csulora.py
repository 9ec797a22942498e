"""CSULoRA's mathematics (arXiv 2605.30640): the update that is closest to D at a penalty on what leaves a subspace.

With P = U_k U_kᵀ and Q = Q_k Q_kᵀ, the projectors on V's leading left and right directions, D is the sum of the
orthogonal blocks D_0 = P D Q, D_1 = P D (I - Q) + (I - P) D Q and D_2 = (I - P) D (I - Q). The minimum of
‖X - D‖² + λ₁‖X_1‖² + λ₂‖X_2‖² is X = D_0 + D_1/(1 + λ₁) + D_2/(1 + λ₂).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from stayaligned.algorithms.alignment_delta import AlignmentSubspace, project_columns
from stayaligned.algorithms.safe_lora import LoraFactors, Operator, Update, coordinates, update_norm

_SEPARABLE = 1e-12


class BlockEnergies(NamedTuple):
    """The squared norms of an update's blocks; their sum is that of the update."""

    aligned: float
    partial: float
    off: float


def block_energies(update: Update, directions: AlignmentSubspace) -> BlockEnergies:
    """Compute ‖D_0‖², ‖D_1‖² and ‖D_2‖² of an update; of LoRA factors without forming BA."""
    left = coordinates(directions.left, update)  # UᵀD
    whole, rows, columns, both = (
        update_norm(each) ** 2 for each in (update, left, _inputs(update, directions), _inputs(left, directions))
    )
    off = max(0.0, whole - rows - columns + both)
    return BlockEnergies(both, max(0.0, rows + columns - 2 * both), off)


@dataclass(frozen=True, slots=True, eq=False)
class BlockAttenuation(Operator):
    """X = D_0 + D_1/(1 + λ₁) + D_2/(1 + λ₂); of LoRA factors of rank r, factors of rank at most 2r."""

    directions: AlignmentSubspace
    partial: float
    """λ₁, or its factor."""
    off: float
    """λ₂, or its factor."""
    relative: bool
    """Whether each λ is its factor times the block's share of ‖D‖²."""

    @property
    def subspace(self) -> AlignmentSubspace:
        """U_k and Q_k."""
        return self.directions

    def kept(self, update: Update) -> tuple[float, float]:
        """Return 1/(1 + λ₁) and 1/(1 + λ₂) for an update."""
        shares = (1.0, 1.0)
        if self.relative:
            energies = block_energies(update, self.directions)
            total = math.fsum(energies)
            shares = (energies.partial / total, energies.off / total) if total else shares
        return 1 / (1 + self.partial * shares[0]), 1 / (1 + self.off * shares[1])

    def __call__(self, update: Update) -> Update:
        """Attenuate the blocks.

        X = P D (Q + p(I - Q)) + (I - P) D (pQ + o(I - Q)) with p = 1/(1 + λ₁) and o = 1/(1 + λ₂): two products of
        rank r. Where o = p² they are one, (P + p(I - P)) D (Q + p(I - Q)).
        """
        p, o = self.kept(update)
        if not isinstance(update, LoraFactors):
            inside = project_columns(self.directions.left, update)
            return self._map_rows(inside, 1.0, p) + self._map_rows(update - inside, p, o)
        inside = project_columns(self.directions.left, update.b)
        if abs(o - p * p) < _SEPARABLE:
            return update._replace(a=self._map_rows(update.a, 1.0, p), b=p * update.b + (1 - p) * inside)
        a = torch.cat([self._map_rows(update.a, 1.0, p), self._map_rows(update.a, p, o)])
        return update._replace(a=a, b=torch.cat([inside, update.b - inside], dim=1))

    def _map_rows(self, rows: torch.Tensor, inside: float, outside: float) -> torch.Tensor:
        """Scale the part of each row in V's leading right directions, and the rest."""
        return outside * rows + (inside - outside) * project_columns(self.directions.right, rows.T).T


def _inputs(update: Update, directions: AlignmentSubspace) -> Update:
    """Compute D Q_k: an update whose inputs are coordinates."""
    if isinstance(update, LoraFactors):
        return update._replace(a=update.a.to(directions.right.dtype) @ directions.right)
    return update.to(directions.right.dtype) @ directions.right
