"""The curvature of a loss: both ends of its Hessian's spectrum, by Lanczos' method from Hessian-vector products.

Lisa's convergence theorem (arXiv 2405.18641, section 4.2) requires ρ > L, where L bounds the Hessian's eigenvalues in
absolute value. The paper does not estimate L. These functions measure L at one point, in the trained weights and in
plain coordinates; L changes with the point, and AdamW rescales every coordinate.

Pure functions of tensors. Vectors are flat: all trained weights concatenated.
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
"""A symmetric matrix, given by its product with a vector; the product is newly allocated."""


@dataclass(frozen=True, slots=True)
class Eigenvalue:
    """An estimate of an eigenvalue, by the Rayleigh quotient of a unit vector y."""

    value: float
    error: float
    """Bound on the distance to the nearest eigenvalue: ‖Ay − value·y‖ plus rounding."""


@dataclass(frozen=True, slots=True)
class Spectrum:
    """Both ends of the spectrum of a symmetric matrix.

    Lanczos' values never lie outside the spectrum, so the true ends are at least as far out, up to rounding. They are
    farther out than `error` only if the random start is almost orthogonal to their eigenvectors.
    """

    largest: Eigenvalue
    smallest: Eigenvalue
    iterations: int
    """Number of products computed: fewer than requested if the start spans a smaller invariant subspace."""

    @property
    def smoothness(self) -> Eigenvalue:
        """L at this point: the largest absolute eigenvalue."""
        end = max(self.largest, self.smallest, key=lambda eigenvalue: abs(eigenvalue.value))
        return Eigenvalue(abs(end.value), end.error)

    @property
    def concavity(self) -> float:
        """The most negative curvature, as a positive number; 0 if there is none.

        With ρ above this value, ρ/2·‖w − anchor‖² outweighs the concavity of the loss around this point.
        """
        return max(0.0, -self.smallest.value)


def random_start(parameters: Sequence[Tensor], seed: int) -> Float[Tensor, " n"]:
    """Draw a standard normal vector with one entry per weight, on the weights' device, in at least fp32.

    The vector is drawn on the CPU, so equal seeds give equal vectors on every device.
    """
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.float64 if any(p.dtype == torch.float64 for p in parameters) else torch.float32
    drawn = torch.randn(sum(p.numel() for p in parameters), generator=generator, dtype=dtype)
    return drawn.to(parameters[0].device)


def spectrum_ends(
    product: Product, start: Float[Tensor, " n"], iterations: int, *, keep_basis: bool = True
) -> Spectrum:
    """Estimate the smallest and largest eigenvalue by Lanczos' method.

    After k products the matrix is known on span(v, Av, …, A^(k−1)v), as a tridiagonal k × k matrix whose extreme
    eigenvalues approach those of A. Scalars are fp64, vectors have the start's type.

    Args:
        product: A, as a function.
        start: v, not zero (see `random_start`).
        iterations: number of products (k).
        keep_basis: keep all k vectors in main memory, and orthogonalize each new vector twice against them. If False,
            3 vectors are kept on the start's device; rounding then repeats eigenvalues, which costs iterations but
            does not move the extreme ones.

    Raises:
        StayalignedError: if a product is not finite.
    """
    size = start.numel()
    iterations = min(iterations, size)
    basis = torch.empty(iterations if keep_basis else 0, size, dtype=start.dtype)
    eps = torch.finfo(start.dtype).eps
    diagonal: list[float] = []
    off_diagonal: list[float] = []
    previous, current = torch.zeros_like(start), start / _norm(start)
    for step in range(iterations):
        image = product(current)
        diagonal.append(_dot(current, image))
        image.sub_(current, alpha=diagonal[-1])
        if off_diagonal:
            image.sub_(previous, alpha=off_diagonal[-1])
        if keep_basis:
            basis[step] = current
            for _ in range(2):
                image.sub_(_project(basis[: step + 1], image))
        off_diagonal.append(_norm(image))
        if not math.isfinite(diagonal[-1] + off_diagonal[-1]):
            raise StayalignedError(
                f"product {step + 1} with the Hessian is not finite",
                hint="The loss overflows or has no second derivative at these weights: check the weights, or use fp32.",
            )
        scale = max(map(abs, [*diagonal, *off_diagonal[:-1]]))
        if off_diagonal[-1] <= 10 * eps * scale:
            break  # the vectors span an invariant subspace
        previous, current = current, image.div_(off_diagonal[-1])
    return _tridiagonal_ends(diagonal, off_diagonal, eps)


def hessian_product(
    parts: Iterable[Callable[[], Tensor]], parameters: Sequence[Tensor], vector: Float[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """Compute ∇²F·v = ∇(∇F·v), with F the sum of the parts.

    Two backward passes per part, one part after the other, so that memory is that of one part.

    Args:
        parts: functions that each compute one summand of F, a differentiable scalar.
        parameters: the weights by which F is differentiated.
        vector: v.
    """
    pieces = _split_like(vector, parameters)
    total = torch.zeros_like(vector)
    for part in parts:
        gradients = torch.autograd.grad(part(), parameters, create_graph=True, materialize_grads=True)
        slope = torch.stack([(g * piece).sum() for g, piece in zip(gradients, pieces, strict=True)]).sum()
        if slope.requires_grad:  # otherwise the part is linear
            products = torch.autograd.grad(slope, parameters, materialize_grads=True)
            for view, added in zip(_split_like(total, parameters, copy=False), products, strict=True):
                view.add_(added)
    return total


def _split_like(vector: Tensor, parameters: Sequence[Tensor], *, copy: bool = True) -> list[Tensor]:
    """Split a vector into the shapes of the parameters: copies in their types, or views."""
    pieces = vector.split([p.numel() for p in parameters])
    shaped = [piece.view(p.shape) for piece, p in zip(pieces, parameters, strict=True)]
    return [piece.to(p) for piece, p in zip(shaped, parameters, strict=True)] if copy else shaped


def _project(basis: Tensor, vector: Tensor) -> Tensor:
    """Project a vector onto the span of orthonormal rows."""
    moved = vector.to(basis.device)
    return (basis.T @ (basis @ moved)).to(vector.device)


def _tridiagonal_ends(diagonal: list[float], off_diagonal: list[float], eps: float) -> Spectrum:
    """Compute the extreme eigenvalues of the tridiagonal matrix.

    The last entry of `off_diagonal` is the norm of the residual that leaves the Krylov space.
    """
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    inner = torch.tensor(off_diagonal[:-1], dtype=torch.float64)
    values, vectors = torch.linalg.eigh(matrix + torch.diag(inner, 1) + torch.diag(inner, -1))
    rounding = len(diagonal) * eps * values.abs().max().item()

    def end(index: int) -> Eigenvalue:
        return Eigenvalue(values[index].item(), abs(off_diagonal[-1] * vectors[-1, index].item()) + rounding)

    return Spectrum(end(-1), end(0), len(diagonal))


def _dot(a: Tensor, b: Tensor) -> float:
    return (a * b).sum(dtype=torch.float64).item()


def _norm(vector: Tensor) -> float:
    return torch.linalg.vector_norm(vector, dtype=torch.float64).item()
