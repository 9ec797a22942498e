"""How curved a loss is: both ends of its Hessian's spectrum, by Lanczos' method from products with it alone.

Lisa's convergence theorem (arXiv 2405.18641, section 4.2) asks for ρ > L, where L bounds the Hessian's eigenvalues in
absolute value. No part of the paper estimates L. What is measured here is L at one point, in the weights that are
trained and in plain coordinates; L changes with the point, and AdamW rescales every coordinate.

Pure functions of tensors. Vectors are flat: all trained weights behind one another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stayaligned.core.errors import StayalignedError

if TYPE_CHECKING or find_spec("jaxtyping"):  # shapes are checked where jaxtyping is installed: in tests
    from jaxtyping import Float

Product = Callable[[Tensor], Tensor]
"""A symmetric matrix, as its product with a vector; the result is new memory."""


@dataclass(frozen=True, slots=True)
class Eigenvalue:
    """An estimate of one, by the Rayleigh quotient of a unit vector y."""

    value: float
    error: float
    """‖Ay − value·y‖ and rounding: some eigenvalue is at most this far."""


@dataclass(frozen=True, slots=True)
class Spectrum:
    """Both ends of a symmetric matrix' spectrum.

    Lanczos' values never lie outside it, so the true ends are at least as far out, up to rounding. They could be
    farther than `error` only if the random start had next to no share in their directions.
    """

    largest: Eigenvalue
    smallest: Eigenvalue
    iterations: int
    """Products that were made: fewer than asked for, where the start's directions were used up."""

    @property
    def smoothness(self) -> Eigenvalue:
        """L at this point: the largest absolute eigenvalue."""
        end = max(self.largest, self.smallest, key=lambda eigenvalue: abs(eigenvalue.value))
        return Eigenvalue(abs(end.value), end.error)

    @property
    def concavity(self) -> float:
        """The most negative curvature, as a positive number; 0 where there is none.

        ρ above it makes ρ/2·‖w − anchor‖² outweigh the loss's own concavity around this point.
        """
        return max(0.0, -self.smallest.value)


def random_start(parameters: Sequence[Tensor], seed: int) -> Float[Tensor, " n"]:
    """A standard normal vector as long as all parameters together, on their device, in fp32 at least.

    Drawn on the CPU: equal seeds give equal vectors on every device.
    """
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.float64 if any(p.dtype == torch.float64 for p in parameters) else torch.float32
    drawn = torch.randn(sum(p.numel() for p in parameters), generator=generator, dtype=dtype)
    return drawn.to(parameters[0].device)


def spectrum_ends(
    product: Product, start: Float[Tensor, " n"], iterations: int, *, keep_basis: bool = True
) -> Spectrum:
    """The smallest and largest eigenvalue, by Lanczos' method.

    After k products the matrix is known on span(v, Av, …, A^(k−1)v), as a tridiagonal k × k matrix whose extreme
    eigenvalues approach A's. Scalars are fp64, vectors are of the start's type.

    Args:
        product: A.
        start: v, not zero; `random_start`.
        iterations: k, the number of products.
        keep_basis: keep all k vectors, in main memory, and orthogonalize every new one against them, twice. Without,
            3 vectors are held wherever the start is; rounding then makes values appear more than once, which costs
            iterations but moves no extreme one.

    Raises:
        StayalignedError: if a product is not finite.
    """
    size = start.numel()
    iterations = min(iterations, size)
    basis = torch.empty(iterations if keep_basis else 0, size, dtype=start.dtype)
    eps = torch.finfo(start.dtype).eps
    diagonal: list[float] = []
    beside: list[float] = []
    before, current = torch.zeros_like(start), start / _norm(start)
    for step in range(iterations):
        image = product(current)
        diagonal.append(_dot(current, image))
        image.sub_(current, alpha=diagonal[-1])
        if beside:
            image.sub_(before, alpha=beside[-1])
        if keep_basis:
            basis[step] = current
            for _ in range(2):
                image.sub_(_share_in(basis[: step + 1], image))
        beside.append(_norm(image))
        if not math.isfinite(diagonal[-1] + beside[-1]):
            raise StayalignedError(
                f"product {step + 1} with the Hessian is not finite",
                hint="The loss has no second derivative at these weights, or overflows: check them, or use fp32.",
            )
        scale = max(map(abs, [*diagonal, *beside[:-1]]))
        if beside[-1] <= 10 * eps * scale:
            break  # a space that A maps into itself
        before, current = current, image.div_(beside[-1])
    return _ends(diagonal, beside, eps)


def hessian_product(
    parts: Iterable[Callable[[], Tensor]], parameters: Sequence[Tensor], vector: Float[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """∇²F·v = ∇(∇F·v), F the sum of the parts: two backward passes, part by part, so memory is that of one part.

    Args:
        parts: each computes its share of F anew, a differentiable scalar.
        parameters: what F is differentiated by.
        vector: v.
    """
    pieces = _like(vector, parameters)
    total = torch.zeros_like(vector)
    for part in parts:
        gradients = torch.autograd.grad(part(), parameters, create_graph=True, materialize_grads=True)
        slope = torch.stack([(g * piece).sum() for g, piece in zip(gradients, pieces, strict=True)]).sum()
        if slope.requires_grad:  # else the part is linear
            products = torch.autograd.grad(slope, parameters, materialize_grads=True)
            for place, added in zip(_like(total, parameters, copy=False), products, strict=True):
                place.add_(added)
    return total


def _like(vector: Tensor, parameters: Sequence[Tensor], *, copy: bool = True) -> list[Tensor]:
    """The vector's pieces in the shapes of the parameters; a copy in their types, or views into it."""
    pieces = vector.split([p.numel() for p in parameters])
    shaped = [piece.view(p.shape) for piece, p in zip(pieces, parameters, strict=True)]
    return [piece.to(p) for piece, p in zip(shaped, parameters, strict=True)] if copy else shaped


def _share_in(basis: Tensor, vector: Tensor) -> Tensor:
    """The vector's projection onto the span of the orthonormal rows."""
    there = vector.to(basis.device)
    return (basis.T @ (basis @ there)).to(vector.device)


def _ends(diagonal: list[float], beside: list[float], eps: float) -> Spectrum:
    """Of the tridiagonal matrix; `beside` ends with the norm that leads out of it."""
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    inner = torch.tensor(beside[:-1], dtype=torch.float64)
    values, vectors = torch.linalg.eigh(matrix + torch.diag(inner, 1) + torch.diag(inner, -1))
    rounding = len(diagonal) * eps * values.abs().max().item()

    def end(index: int) -> Eigenvalue:
        return Eigenvalue(values[index].item(), abs(beside[-1] * vectors[-1, index].item()) + rounding)

    return Spectrum(end(-1), end(0), len(diagonal))


def _dot(a: Tensor, b: Tensor) -> float:
    return (a * b).sum(dtype=torch.float64).item()


def _norm(vector: Tensor) -> float:
    return torch.linalg.vector_norm(vector, dtype=torch.float64).item()
