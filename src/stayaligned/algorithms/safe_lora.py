"""Safe LoRA's mathematics (arXiv 2405.16833, section 3): operators on an update, and rules that select layers.

V = W_aligned - W_base is the alignment delta of one weight, ΔW the update: scaling·BA of a LoRA, or W_ft - W_aligned
of a fully fine-tuned model. Every operator maps the factors (A, B) to new factors. For a LoRA neither
ΔW nor any out × out matrix is formed: C·B is V(VᵀB)/‖V‖_F, and norms and cosines are computed from rank × rank Gram
matrices.

Pure functions of tensors. Operators work in the dtype of V (fp32 from a checkpoint). Norms and Grams accumulate in
fp64: an fp32 cosine over the flattened update is off by 1e-3 at width 4096, and is compared with a threshold.
"""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal, NamedTuple, cast

import torch
from torch import Tensor

from stayaligned.algorithms.alignment_delta import (
    AlignmentDelta,
    AlignmentSubspace,
    TruncatedDelta,
    cached_rows,
    frobenius_norm,
    project_columns,
    random_frame,
)

if TYPE_CHECKING or find_spec("jaxtyping"):  # shapes are checked where jaxtyping is installed: in tests
    from jaxtyping import Float

_ROUNDING = 4e-7
"""Error of a product with singular triplets in fp32, as a share of the largest squared singular value."""
_CANCELLED = 1e-13
"""Share of the sum of the absolute terms of ‖BA‖² below which the sum is rounding error: BA is zero."""
_ORDINARY_EXPONENT = 40
"""Factors whose largest value is between 2^-40 and 2^40 are of an ordinary size."""
_SMALLEST_NORM = 2.0**-126
"""Norm below which an update is zero in fp32, in which every host computes it."""

ComplementSide = Literal["left", "right", "both"]
Selection = Callable[[Mapping[str, float]], frozenset[str]]
"""A rule that selects the modules to change from the similarity of each."""


class LoraFactors(NamedTuple):
    """The factors of one LoRA update, ΔW = scaling · b @ a."""

    a: Float[Tensor, "rank in_features"]
    b: Float[Tensor, "out_features rank"]
    scaling: float
    """alpha / rank, or alpha / √rank for rank-stabilized LoRA."""

    def to(self, device: str) -> LoraFactors:
        """Return the factors on another device."""
        return LoraFactors(self.a.to(device), self.b.to(device), self.scaling)


Update = LoraFactors | Tensor
"""ΔW, as factors or as a matrix (out, in)."""


class Operator(ABC):
    """A linear map of updates."""

    @property
    def subspace(self) -> AlignmentSubspace | None:
        """The directions that the operator is built on; None for the paper's C, which weights all directions."""
        return None

    @abstractmethod
    def __call__(self, update: Update) -> Update:
        """Map an update: factors to factors, a matrix to a matrix."""

    def map_all(self, updates: Sequence[LoraFactors]) -> list[LoraFactors]:
        """Map the updates of several adapters."""
        return [cast("LoraFactors", self(update)) for update in updates]


class SidedOperator(Operator):
    """A linear map of the outputs of updates (B's columns), of their inputs (A's rows), or of both."""

    @abstractmethod
    def map_outputs(self, columns: Float[Tensor, "out_features m"]) -> Float[Tensor, "out_features m"]:
        """Map the columns of B."""

    def map_inputs(self, rows: Float[Tensor, "m in_features"]) -> Float[Tensor, "m in_features"]:
        """Map the rows of A; returns them unchanged unless overridden."""
        return rows

    def __call__(self, update: Update) -> Update:
        """Map an update: to factors of the same rank and scaling, or to a matrix."""
        if isinstance(update, LoraFactors):
            return LoraFactors(self.map_inputs(update.a), self.map_outputs(update.b), update.scaling)
        return self.map_inputs(self.map_outputs(update))

    def map_all(self, updates: Sequence[LoraFactors]) -> list[LoraFactors]:
        """Map several updates in one product, because each column of B and each row of A is mapped by itself."""
        ranks = [update.b.shape[1] for update in updates]
        stacked = torch.cat([update.a for update in updates])
        outputs = self.map_outputs(torch.cat([update.b for update in updates], dim=1)).split(ranks, dim=1)
        mapped = self.map_inputs(stacked)
        # `compare` reuses the Gram matrix of an A that is the same tensor before and after.
        inputs = [update.a for update in updates] if mapped is stacked else mapped.split(ranks)
        return [LoraFactors(a, b, update.scaling) for a, b, update in zip(inputs, outputs, updates, strict=True)]


@dataclass(frozen=True, slots=True, eq=False)
class ScaledGram(SidedOperator):
    """The paper's C = V Vᵀ / ‖V‖_F (section 3.4): ΔW ← C ΔW.

    C is not a projector: its eigenvalues are σ²/‖V‖_F, so C(cV) = |c|·C(V) and the norm of the mapped update depends on
    the size of V. The paper's code forms C (out × out); here C·B = V(VᵀB)/‖V‖_F, the same matrix for 1/d of the work.
    """

    delta: AlignmentDelta

    def map_outputs(self, columns: Float[Tensor, "out_features m"]) -> Float[Tensor, "out_features m"]:
        """Compute V(VᵀB)/‖V‖_F.

        Raises:
            ValueError: if V is zero, where C is 0/0 (the paper's code continues with NaN).
        """
        if self.delta.norm == 0:
            raise ValueError("C = V Vᵀ/‖V‖ is undefined for V = 0")
        return self.delta.gram(columns) / self.delta.norm

    def truncation_error(self, shrinkage: float) -> float | None:
        """Bound the relative error of a truncated V, ‖(C - C_k)ΔW‖ / ‖C_kΔW‖ (Frobenius norm); None for a full V.

        ‖(C - C_k)ΔW‖ ≤ σ²_{k+1}/‖V‖ · ‖ΔW‖, with σ²_{k+1} bounded by the energy that V's k triplets leave. The bound
        holds for exact singular triplets; those of large weights are sampled, and their own error is not included.

        Args:
            shrinkage: ‖C_kΔW‖ / ‖ΔW‖.
        """
        missing = self.delta.largest_missing
        if missing is None:
            return None
        lost = missing / self.delta.norm
        return min(lost / shrinkage, sys.float_info.max) if shrinkage else sys.float_info.max * (lost > 0)

    def similarity_bounds(self, update: Update, found: Comparison) -> tuple[float, float] | None:
        """Bound cos(ΔW, CΔW) with the complete V, given that with a truncated one; None for a full V.

        Let G = U Σ² Uᵀ, R = E Eᵀ with E = V - U Uᵀ V, and x = ‖ΔW - U UᵀΔW‖². R is positive semidefinite and orthogonal
        to U, so (G + R)ΔW has the inner product a + t with ΔW and the squared norm g + q, with 0 ≤ t ≤ ‖R‖ x and
        t²/x ≤ q ≤ ‖R‖ t. With q = ‖R‖ t the cosine is least at t = a - 2g/‖R‖, or at 0; with q = t²/x it is greatest
        at t = gx/a, or at ‖R‖ x (all for ‖ΔW‖ = 1; the bound on ‖R‖ may exceed σ_k²). Sampled triplets add U Σ (E Q)ᵀ +
        its transpose, whose norm `Tail.cross` bounds; fp32 rounding is added to it.

        Args:
            update: ΔW.
            found: the comparison of ΔW with its image under this operator.
        """
        delta = self.delta
        if not isinstance(delta, TruncatedDelta):
            return None
        if found.norm == 0:
            return 0.0, 1.0
        largest = delta.largest_missing
        inside = min(1.0, (update_norm(coordinates(delta.left, update)) / found.norm) ** 2)
        outside = 1.0 - inside
        length = found.shrinkage * delta.norm  # √g
        dot, limit = found.similarity * length, largest * outside
        least = min(limit, max(0.0, dot - 2 * length**2 / largest)) if largest else 0.0
        gained = min(limit, length**2 * outside / dot) if dot > 0 else limit
        valley = math.sqrt(length**2 + largest * least)
        peak = math.hypot(length, gained / math.sqrt(outside)) if outside else length
        top = delta.values[0].item() ** 2 if len(delta.values) else 0.0
        off = (delta.tail.cross if delta.tail else 0.0) + _ROUNDING * (top + largest)
        if length <= off:
            return 0.0, 1.0
        low = (dot + least - off) / (valley + off)
        high = (dot + gained + off) / (peak - off)
        return min(1.0, max(0.0, low)), min(1.0, high)


@dataclass(frozen=True, slots=True, eq=False)
class Orthogonal(SidedOperator):
    """The rank-k orthogonal projector ΔW ← U_k U_kᵀ ΔW, idempotent and independent of the size of V.

    Replaces the paper's "exact" V(VᵀV)⁻¹Vᵀ (equation 2), which is the identity when V is square with full rank.
    """

    directions: AlignmentSubspace

    @property
    def subspace(self) -> AlignmentSubspace:
        """U_k and Q_k."""
        return self.directions

    def map_outputs(self, columns: Float[Tensor, "out_features m"]) -> Float[Tensor, "out_features m"]:
        """Compute U_k(U_kᵀB)."""
        return project_columns(self.directions.left, columns)


@dataclass(frozen=True, slots=True, eq=False)
class ComplementOperator(SidedOperator):
    """The removal of a subspace: ΔW ← (I - U_k U_kᵀ) ΔW (I - Q_k Q_kᵀ), or one side only.

    Idempotent. Not in the paper; it belongs to the family of null-space and gradient projections.
    """

    directions: AlignmentSubspace
    side: ComplementSide = "both"
    """`left` acts on the outputs (B), `right` on the inputs (A)."""

    @property
    def subspace(self) -> AlignmentSubspace:
        """U_k and Q_k."""
        return self.directions

    def map_outputs(self, columns: Float[Tensor, "out_features m"]) -> Float[Tensor, "out_features m"]:
        """Compute B - U_k(U_kᵀB); unchanged for `side="right"`."""
        if self.side == "right":
            return columns
        return columns.to(self.directions.left.dtype) - project_columns(self.directions.left, columns)

    def map_inputs(self, rows: Float[Tensor, "m in_features"]) -> Float[Tensor, "m in_features"]:
        """Compute A - (A Q_k)Q_kᵀ; unchanged for `side="left"`."""
        if self.side == "left":
            return rows
        return rows.to(self.directions.right.dtype) - project_columns(self.directions.right, rows.T).T


@dataclass(frozen=True, slots=True, eq=False)
class RandomlyRotated(SidedOperator):
    """R C Rᵀ instead of C, with R a uniformly random rotation: an operator with C's spectrum, but not V's directions.

    R is not formed for a LoRA: with B = Q S (QR) only Z = RᵀQ and R on the part of C·Z outside Z's span matter, both
    uniformly random orthonormal frames. Each call draws new frames from the generator.
    """

    operator: ScaledGram
    generator: torch.Generator

    def map_outputs(self, columns: Float[Tensor, "out_features m"]) -> Float[Tensor, "out_features m"]:
        """Compute R C Rᵀ B."""
        size, count = columns.shape
        if 2 * count > size:
            rotation = self._draw_frame(columns, size)
            mapped = self.operator.map_outputs(rotation.T @ columns.to(rotation)).to(rotation)
            return (rotation @ mapped).to(columns.dtype)
        frame, coordinates = torch.linalg.qr(columns.double())
        rotated = self._draw_frame(columns, count)
        image = self.operator.map_outputs(rotated.to(columns.dtype)).double()
        inside = rotated.T @ image
        _, outside = torch.linalg.qr(image - rotated @ inside)
        drawn = torch.randn(size, count, generator=self.generator, dtype=torch.float64).to(frame)
        orthogonal, _ = torch.linalg.qr(drawn - frame @ (frame.T @ drawn))
        return ((frame @ inside + orthogonal @ outside) @ coordinates).to(columns.dtype)

    def _draw_frame(self, columns: Tensor, count: int) -> Tensor:
        """Draw uniformly random orthonormal columns, (out, count), in fp64."""
        return random_frame(columns.shape[0], count, self.generator).to(columns.device)


def coordinates(basis: Tensor, update: Update) -> Update:
    """Compute UᵀΔW for orthonormal columns U."""
    if isinstance(update, LoraFactors):
        return update._replace(b=basis.T @ update.b.to(basis.dtype))
    return basis.T @ update.to(basis.dtype)


def scale_update(update: Update, factor: float) -> Update:
    """Multiply an update by `factor`; of LoRA factors, B is multiplied."""
    return update._replace(b=update.b * factor) if isinstance(update, LoraFactors) else update * factor


class Comparison(NamedTuple):
    """The comparison of an update with its image under an operator."""

    similarity: float
    """cos(ΔW, ΔW')."""
    shrinkage: float
    """‖ΔW'‖ / ‖ΔW‖; 1 for an update that was zero."""
    norm: float
    """‖ΔW‖_F."""


def compare(before: Update, after: Update) -> Comparison:
    """Compare ΔW with ΔW': cosine and norms from Grams in fp64, without forming BA.

    cos(ΔW, ΔW') = ⟨ΔW, ΔW'⟩_F / (‖ΔW‖ ‖ΔW'‖), with ⟨B₁A₁, B₂A₂⟩ = Σ (B₁ᵀB₂) ∘ (A₁A₂ᵀ), section 3.2. A zero update has
    no direction; its similarity is defined as 0, as in the paper's code. That code computes the cosine of the two
    flattened out × in products in fp32 and rounds it to five decimals.

    Raises:
        ValueError: if an update is not finite.
    """
    inputs = None  # A₁A₂ᵀ: the largest part of the work, computed once because most operators leave A unchanged
    if isinstance(before, LoraFactors) and isinstance(after, LoraFactors) and before.a is after.a:
        inputs = _input_gram(before, after)
    pairs = (before, before), (after, after), (before, after)
    squares = [_inner(x, y, inputs) for x, y in pairs]
    if not all(map(math.isfinite, squares)):
        raise ValueError("the update is not finite")
    norm, norm_after = (math.sqrt(max(0.0, square)) for square in squares[:2])
    product = norm * norm_after
    similarity = 0.0 if product == 0 else max(-1.0, min(1.0, squares[2] / product))
    return Comparison(similarity, norm_after / norm if norm else 1.0, norm)


def update_norm(update: Update) -> float:
    """Compute ‖ΔW‖_F in fp64; for LoRA factors from their r × r Grams."""
    if isinstance(update, LoraFactors):
        return math.sqrt(max(0.0, _inner(update, update)))
    return frobenius_norm(update)


def is_zero(update: Update) -> bool:
    """Return whether ΔW is zero: exactly, by cancellation in BA, or because no number of fp32 is as small."""
    return update_norm(update) < _SMALLEST_NORM


def powers_of_two(factors: LoraFactors) -> tuple[int, int]:
    """Return exponents (i, j) with which `move_powers` gives A and B an ordinary size; (0, 0) if they have one."""
    powers: list[int] = []
    for tensor in (factors.a, factors.b):
        size = tensor.abs().max().item() if tensor.numel() else 0.0
        exponent = math.frexp(size)[1]
        powers.append(exponent if size and abs(exponent) > _ORDINARY_EXPONENT else 0)
    return powers[0], powers[1]


def move_powers(factors: LoraFactors, powers: tuple[int, int]) -> LoraFactors:
    """Divide A by 2^i and B by 2^j and multiply the scaling instead, so that fp32 products don't underflow.

    The update does not change. The negative exponents undo it.
    """
    if powers == (0, 0):
        return factors
    a, b = (
        (tensor.double() * 2.0**-power).to(tensor.dtype)
        for tensor, power in zip((factors.a, factors.b), powers, strict=True)
    )
    return LoraFactors(a, b, factors.scaling * 2.0 ** sum(powers))


def select_below(threshold: float) -> Selection:
    """Select the modules with similarity < threshold, section 3.2.

    The paper's text uses <; its code compares the rounded similarity with <=.
    """
    return lambda similarities: frozenset(name for name, value in similarities.items() if value < threshold)


def select_lowest(count: int) -> Selection:
    """Select exactly the `count` least similar modules; ties go to the name that sorts first.

    Raises:
        ValueError: from the rule, if there are fewer than `count` modules.
    """

    def select(similarities: Mapping[str, float]) -> frozenset[str]:
        if not 0 <= count <= len(similarities):
            raise ValueError(f"can't select the lowest {count} of {len(similarities)} modules")
        return frozenset(sorted(similarities, key=lambda name: (similarities[name], name))[:count])

    return select


def select_all(similarities: Mapping[str, float]) -> frozenset[str]:
    """Select all modules."""
    return frozenset(similarities)


def _inner(x: Update, y: Update, inputs: Tensor | None = None) -> float:
    """Compute ⟨x, y⟩_F; `inputs` is A₁A₂ᵀ in fp64 if already computed. ‖BA‖² that is only rounding error is 0."""
    if isinstance(x, LoraFactors) and isinstance(y, LoraFactors):
        terms = (x.b.double().T @ y.b.double()) * (_input_gram(x, y) if inputs is None else inputs)
        total = terms.sum().item()
        if x is y and abs(total) <= _CANCELLED * terms.abs().sum().item():
            return 0.0
        return x.scaling * y.scaling * total
    if isinstance(x, LoraFactors) or isinstance(y, LoraFactors):
        raise TypeError("can't compare LoRA factors with a matrix")
    rows = cached_rows(x)
    blocks = zip(x.split(rows), y.split(rows), strict=True)
    return math.fsum((one.double() * two.double()).sum().item() for one, two in blocks)


def _input_gram(x: LoraFactors, y: LoraFactors) -> Tensor:
    """Compute A₁A₂ᵀ in fp64."""
    a = x.a.double()
    return a @ (a if y.a is x.a else y.a.double()).T
