"""Lisa with exact sub-solves (arXiv 2405.18641, section 4.2), in fp64, for `convergence.py`.

One round is w̃ ← argmin f + ρ/2‖· − w‖², then w ← argmin h + ρ/2‖· − w̃‖²: alternating minimization of the potential
D(w̃, w) = f(w̃) + h(w) + ρ/2‖w̃ − w‖².
"""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

EPS = torch.finfo(torch.float64).eps


# ---- functions -----------------------------------------------------------------------------------------------------


class Objective(ABC):
    """A twice differentiable function of a vector."""

    @property
    @abstractmethod
    def smoothness(self) -> float:
        """L: a bound on the absolute eigenvalues of the Hessian at all points."""

    @property
    @abstractmethod
    def concavity(self) -> float:
        """m: a bound on −(smallest eigenvalue) at all points; 0 for a convex function. m ≤ L."""

    @abstractmethod
    def value(self, w: Tensor) -> float: ...
    @abstractmethod
    def gradient(self, w: Tensor) -> Tensor: ...
    @abstractmethod
    def hessian(self, w: Tensor) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Quadratic(Objective):
    """½(w − c)ᵀ H (w − c)."""

    matrix: Tensor
    center: Tensor

    @classmethod
    def of(cls, eigenvalues: list[float], generator: torch.Generator) -> Quadratic:
        """Draw a quadratic with these eigenvalues, a random orthonormal basis and a random center."""
        n = len(eigenvalues)
        basis = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
        matrix = basis @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ basis.T
        return cls((matrix + matrix.T) / 2, torch.randn(n, generator=generator, dtype=torch.float64))

    @cached_property
    def smoothness(self) -> float:
        return torch.linalg.eigvalsh(self.matrix).abs().max().item()

    @cached_property
    def concavity(self) -> float:
        return max(0.0, -torch.linalg.eigvalsh(self.matrix)[0].item())

    def value(self, w: Tensor) -> float:
        return (0.5 * (w - self.center) @ self.matrix @ (w - self.center)).item()

    def gradient(self, w: Tensor) -> Tensor:
        return self.matrix @ (w - self.center)

    def hessian(self, w: Tensor) -> Tensor:
        return self.matrix


class Link(NamedTuple):
    """The function φ of a sum, its derivatives, and the supremum of its second derivative; φ is convex."""

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    curvature: Callable[[Tensor], Tensor]
    steepest: float


def log_cosh(z: Tensor) -> Tensor:
    return z.abs() + torch.nn.functional.softplus(-2 * z.abs()) - math.log(2)


SOFTPLUS = Link(torch.nn.functional.softplus, torch.sigmoid, lambda z: torch.sigmoid(z) * torch.sigmoid(-z), 0.25)
LOG_COSH = Link(log_cosh, torch.tanh, lambda z: 1 - torch.tanh(z) ** 2, 1.0)
# z⁴/12 around 0: the quotient of slope and √value vanishes there, so that θ = 3/4.
FLAT = Link(lambda z: z**2 / 2 - log_cosh(z), lambda z: z - torch.tanh(z), lambda z: torch.tanh(z) ** 2, 1.0)


@dataclass(frozen=True, eq=False)
class LinkSum(Objective):
    """Σ sᵢ φ(aᵢ·w − bᵢ) + μ/2‖w‖²: logistic regression for φ = softplus and s = 1; not convex if an sᵢ is −1."""

    link: Link
    rows: Tensor
    offsets: Tensor
    signs: Tensor
    ridge: float

    @classmethod
    def of(cls, link: Link, signs: list[float], n: int, ridge: float, generator: torch.Generator) -> LinkSum:
        m = len(signs)
        rows = torch.randn(m, n, generator=generator, dtype=torch.float64) / n**0.5
        offsets = torch.randn(m, generator=generator, dtype=torch.float64)
        return cls(link, rows, offsets, torch.tensor(signs, dtype=torch.float64), ridge)

    def _largest(self, sign: float) -> float:
        chosen = self.rows[self.signs == sign]
        return self.link.steepest * torch.linalg.matrix_norm(chosen, 2).item() ** 2 if len(chosen) else 0.0

    @cached_property
    def smoothness(self) -> float:
        return max(self._largest(1.0) + self.ridge, self.concavity)

    @cached_property
    def concavity(self) -> float:
        return max(0.0, self._largest(-1.0) - self.ridge)

    def value(self, w: Tensor) -> float:
        terms = self.signs * self.link.value(self.rows @ w - self.offsets)
        return (terms.sum() + self.ridge / 2 * w @ w).item()

    def gradient(self, w: Tensor) -> Tensor:
        return self.rows.T @ (self.signs * self.link.slope(self.rows @ w - self.offsets)) + self.ridge * w

    def hessian(self, w: Tensor) -> Tensor:
        weights = self.signs * self.link.curvature(self.rows @ w - self.offsets)
        return self.rows.T @ (weights[:, None] * self.rows) + self.ridge * torch.eye(len(w), dtype=torch.float64)


# ---- the method ----------------------------------------------------------------------------------------------------


class UnboundedError(Exception):
    """Raised if a sub-problem is not bounded below, so that Lisa's argmin does not exist."""


def solve(objective: Objective, rho: float, anchor: Tensor) -> Tensor:
    """Compute the argmin of objective + ρ/2‖· − anchor‖² by Newton's method with backtracking, to convergence.

    Raises:
        UnboundedError: if it is a quadratic without a minimum.
    """
    if isinstance(objective, Quadratic) and objective.concavity >= rho:
        raise UnboundedError

    def total(w: Tensor) -> float:
        return objective.value(w) + rho / 2 * ((w - anchor) @ (w - anchor)).item()

    w = anchor
    residual = stationarity(objective, rho, anchor, w).norm().item()
    for _ in range(200):
        step = newton_step(objective, rho, anchor, w)
        new = w - step
        after = stationarity(objective, rho, anchor, new).norm().item()
        if after >= residual:  # far from the minimum, where the value determines the step size; or at the minimum
            size, before = 1.0, total(w)
            slope = (stationarity(objective, rho, anchor, w) @ step).item()
            while total(w - size * step) > before - 1e-4 * size * slope and size > 1e-3:
                size /= 2
            if size <= 1e-3 or slope <= EPS * (1 + abs(before)):
                return w
            new = w - size * step
            after = stationarity(objective, rho, anchor, new).norm().item()
        w, residual = new, after
    return w


def stationary_point(objective: Quadratic, rho: float, anchor: Tensor) -> Tensor:
    """Return the stationary point of a quadratic sub-problem, whether or not it is a minimum."""
    return anchor - newton_step(objective, rho, anchor, anchor)


def stationarity(objective: Objective, rho: float, anchor: Tensor, w: Tensor) -> Tensor:
    return objective.gradient(w) + rho * (w - anchor)


def newton_step(objective: Objective, rho: float, anchor: Tensor, w: Tensor) -> Tensor:
    curvature = objective.hessian(w) + rho * torch.eye(len(w), dtype=torch.float64)
    return torch.linalg.solve(curvature, stationarity(objective, rho, anchor, w))


class Iterate(NamedTuple):
    aligned: Tensor
    """w̃, the end of the alignment phase."""
    tuned: Tensor
    """w, the end of the fine-tuning phase."""


@dataclass(frozen=True, eq=False)
class Pair:
    """f and h of one problem, and ρ."""

    f: Objective
    h: Objective
    rho: float

    @cached_property
    def smoothness(self) -> float:
        return max(self.f.smoothness, self.h.smoothness)

    def round(self, at: Iterate, solver: Callable[..., Tensor] = solve) -> Iterate:
        aligned = solver(self.f, self.rho, at.tuned)
        return Iterate(aligned, solver(self.h, self.rho, aligned))

    def potential(self, at: Iterate) -> float:
        """Compute D(w̃, w)."""
        gap = at.aligned - at.tuned
        return self.f.value(at.aligned) + self.h.value(at.tuned) + self.rho / 2 * (gap @ gap).item()

    def potential_hessian(self, at: Iterate) -> Tensor:
        diagonal = self.rho * torch.eye(len(at.tuned), dtype=torch.float64)
        f, h = self.f.hessian(at.aligned) + diagonal, self.h.hessian(at.tuned) + diagonal
        return torch.cat([torch.cat([f, -diagonal], 1), torch.cat([-diagonal, h], 1)])

    def gradient_sum(self, at: Iterate) -> Tensor:
        """Compute ∇f(w̃) + ∇h(w), which converges to zero by the theorem."""
        return self.f.gradient(at.aligned) + self.h.gradient(at.tuned)

    def lemma_1(self, before: Iterate, after: Iterate) -> float:
        """Compute ‖∇f(w̃') + ∇h(w') + ρ(w' − w)‖, relative to the terms; 0 by Lemma 1."""
        scale = self.f.gradient(after.aligned).norm() + self.h.gradient(after.tuned).norm()
        scale += self.rho * (after.tuned.norm() + before.tuned.norm() + after.aligned.norm())
        error = self.gradient_sum(after) + self.rho * (after.tuned - before.tuned)
        return (error.norm() / scale).item() if scale else 0.0

    def lemma_3(self, before: Iterate, after: Iterate) -> float:
        """Compute D' − D + (ρ − L)/2·(‖Δw‖² + ‖Δw̃‖²), relative to the terms of D; at most 0 by Lemma 3."""
        moved = (after.tuned - before.tuned).square().sum() + (after.aligned - before.aligned).square().sum()
        excess = self.potential(after) - self.potential(before) + (self.rho - self.smoothness) / 2 * moved.item()
        return excess / (self.size(before) + self.size(after) + sys.float_info.min)

    def size(self, at: Iterate) -> float:
        """Compute the sum of the absolute terms of D, the scale of its rounding error."""
        gap = at.aligned - at.tuned
        scale = self.smoothness * (at.aligned.norm() ** 2 + at.tuned.norm() ** 2) + self.rho * (gap @ gap)
        return abs(self.f.value(at.aligned)) + abs(self.h.value(at.tuned)) + scale.item()


def run(
    pair: Pair, start: Tensor, rounds: int, *, small: float = 0.0, solver: Callable[..., Tensor] = solve
) -> list[Iterate]:
    """Return the iterates from w̃ = w = start, until ‖∇f(w̃) + ∇h(w)‖ is `small` or 1e12 times the first."""
    iterates = [Iterate(start, start)]
    first = 0.0
    for _ in range(rounds):
        iterates.append(pair.round(iterates[-1], solver))
        norm = pair.gradient_sum(iterates[-1]).norm().item()
        first = first or norm
        if norm <= small * first or norm > 1e12 * first:
            break
    return iterates


def contraction(pair: Pair, iterates: list[Iterate]) -> float:
    """Return the factor of ‖∇f(w̃) + ∇h(w)‖ per round, over the later half of the rounds."""
    norms = [pair.gradient_sum(each).norm().item() for each in iterates[1:]]
    half = len(norms) // 2
    return (norms[-1] / norms[half]) ** (1 / (len(norms) - 1 - half)) if len(norms) > 2 and norms[-1] else 0.0


def exact_contraction(pair: Pair, at: Iterate) -> float:
    """Return the largest absolute eigenvalue of a round's Jacobian near a limit, (H_h + ρ)⁻¹ρ (H_f + ρ)⁻¹ρ."""
    diagonal = pair.rho * torch.eye(len(at.tuned), dtype=torch.float64)
    inner = torch.linalg.solve(pair.f.hessian(at.aligned) + diagonal, diagonal)
    outer = torch.linalg.solve(pair.h.hessian(at.tuned) + diagonal, diagonal)
    return torch.linalg.eigvals(outer @ inner).abs().max().item()


def contraction_bounds(pair: Pair, at: Iterate) -> tuple[float, float]:
    """Return the theorem's bound on that factor for θ = ½: as the proof gives it, and as the paper prints it.

    At a minimum where D's smallest eigenvalue is μ, D − D* ≤ ‖∇D‖²/(2μ): the KL inequality with c²(1−θ)² = 1/(2μ).
    Lemma 3, ∇D = (ρ(w_t − w_{t+1}), 0) and this make r_t − r_{t+1} ≥ κ r_{t+1} with κ = (ρ − L)μ/ρ². The paper has 2κ
    (a ½ of Lemma 3 is lost on the way) and r_t on the right.
    """
    mu = torch.linalg.eigvalsh(pair.potential_hessian(at))[0].item()
    kappa = (pair.rho - pair.smoothness) * mu / pair.rho**2
    return (1 + kappa) ** -0.5, max(0.0, 1 - 2 * kappa) ** 0.5
