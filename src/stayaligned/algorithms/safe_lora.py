"""Safe LoRA's maths (arXiv 2405.16833, section 3): what an alignment subspace keeps of an update, and which layers.

V = W_aligned - W_base is one weight's alignment direction, ΔW its update: scaling·BA of a LoRA, or W_ft - W_aligned of
a full fine-tune. Every operator here maps the factors (A, B) to new factors of the same rank. Of a LoRA neither ΔW nor
any out × out matrix is ever formed: C·B is V(VᵀB)/‖V‖_F, and norms and cosines live in rank × rank Gram matrices.

Pure functions of tensors. Operators work in the dtype of V (fp32 from a checkpoint); norms and Grams accumulate in
fp64, because an fp32 cosine over the flattened update is off by 1e-3 at width 4096 and is compared with a threshold.
"""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from stayaligned.algorithms.alignment_delta import (
    AlignmentDelta,
    AlignmentSubspace,
    cached_rows,
    frobenius_norm,
    onto,
    random_frame,
)

if TYPE_CHECKING or find_spec("jaxtyping"):  # shapes are checked where jaxtyping is installed: in tests
    from jaxtyping import Float

Side = Literal["left", "right", "both"]
Selection = Callable[[Mapping[str, float]], frozenset[str]]
"""Which modules to change, given the similarity of each."""


class LoraFactors(NamedTuple):
    """One LoRA update, ΔW = scaling · b @ a."""

    a: Float[Tensor, "rank in_features"]
    b: Float[Tensor, "out_features rank"]
    scaling: float
    """alpha / rank, or alpha / √rank for rank-stabilised LoRA."""

    def to(self, device: str) -> LoraFactors:
        """The same on another device."""
        return LoraFactors(self.a.to(device), self.b.to(device), self.scaling)


Update = LoraFactors | Tensor
"""ΔW, as factors or as a matrix (out, in)."""


class Operator(ABC):
    """A linear map of updates that acts on their outputs (B's columns), on their inputs (A's rows), or on both."""

    @property
    def subspace(self) -> AlignmentSubspace | None:
        """The directions it is built on; None for the paper's C, which weighs all of them."""
        return None

    @abstractmethod
    def outputs(self, columns: Float[Tensor, "out_features m"]) -> Float[Tensor, "out_features m"]:
        """The map of B's columns."""

    def inputs(self, rows: Float[Tensor, "m in_features"]) -> Float[Tensor, "m in_features"]:
        """The map of A's rows; unless overridden they stay."""
        return rows

    def __call__(self, update: Update) -> Update:
        """The mapped update: factors of the same rank and scaling, or a matrix."""
        if isinstance(update, LoraFactors):
            return LoraFactors(self.inputs(update.a), self.outputs(update.b), update.scaling)
        return self.inputs(self.outputs(update))


@dataclass(frozen=True, slots=True, eq=False)
class ScaledGram(Operator):
    """The paper's C = V Vᵀ / ‖V‖_F (section 3.4): ΔW ← C ΔW.

    Not a projector: its eigenvalues are σ²/‖V‖_F, so C(cV) = |c|·C(V) and what is left of an update depends on the
    size of V. The paper's code forms C (out × out); here C·B = V(VᵀB)/‖V‖_F, the same matrix for 1/d of the work.
    """

    delta: AlignmentDelta

    def outputs(self, columns: Float[Tensor, "out_features m"]) -> Float[Tensor, "out_features m"]:
        """V(VᵀB)/‖V‖_F.

        Raises:
            ValueError: if V is zero, where C is 0/0 (the paper's code goes on with NaN).
        """
        if self.delta.norm == 0:
            raise ValueError("C = V Vᵀ/‖V‖ is undefined for V = 0")
        return self.delta.gram(columns) / self.delta.norm

    def truncation_error(self, shrinkage: float) -> float | None:
        """What a truncated V costs: a bound on ‖(C - C_k)ΔW‖ / ‖C_kΔW‖, in the Frobenius norm; None for a whole V.

        ‖(C - C_k)ΔW‖ ≤ σ²_{k+1}/‖V‖ · ‖ΔW‖, with σ²_{k+1} bounded by what V's energy leaves for it. It holds for exact
        singular triplets; those of large weights are sampled, and what they miss is not in it.

        Args:
            shrinkage: ‖C_kΔW‖ / ‖ΔW‖.
        """
        missing = self.delta.largest_missing
        if missing is None:
            return None
        lost = missing / self.delta.norm
        return min(lost / shrinkage, sys.float_info.max) if shrinkage else sys.float_info.max * (lost > 0)


@dataclass(frozen=True, slots=True, eq=False)
class Orthogonal(Operator):
    """The rank-k orthogonal projector ΔW ← U_k U_kᵀ ΔW, idempotent and independent of the size of V.

    Stands in for the paper's "exact" V(VᵀV)⁻¹Vᵀ (equation 2), which is the identity when V is square with full rank.
    """

    directions: AlignmentSubspace

    @property
    def subspace(self) -> AlignmentSubspace:
        """U_k and Q_k."""
        return self.directions

    def outputs(self, columns: Float[Tensor, "out_features m"]) -> Float[Tensor, "out_features m"]:
        """U_k(U_kᵀB)."""
        return onto(self.directions.left, columns)


@dataclass(frozen=True, slots=True, eq=False)
class Complement(Operator):
    """Remove the subspace: ΔW ← (I - U_k U_kᵀ) ΔW (I - Q_k Q_kᵀ), or one side only.

    Not in the paper; of the family of null-space and gradient projections. Idempotent.
    """

    directions: AlignmentSubspace
    side: Side = "both"
    """`left` acts on the outputs (B), `right` on the inputs (A)."""

    @property
    def subspace(self) -> AlignmentSubspace:
        """U_k and Q_k."""
        return self.directions

    def outputs(self, columns: Float[Tensor, "out_features m"]) -> Float[Tensor, "out_features m"]:
        """B - U_k(U_kᵀB), unless only the right side is meant."""
        if self.side == "right":
            return columns
        return columns.to(self.directions.left.dtype) - onto(self.directions.left, columns)

    def inputs(self, rows: Float[Tensor, "m in_features"]) -> Float[Tensor, "m in_features"]:
        """A - (A Q_k)Q_kᵀ, unless only the left side is meant."""
        if self.side == "left":
            return rows
        return rows.to(self.directions.right.dtype) - onto(self.directions.right, rows.T).T


@dataclass(frozen=True, slots=True, eq=False)
class RandomlyRotated(Operator):
    """R C Rᵀ in place of C, with R a uniformly random rotation: the paper's C with V's spectrum, but no direction of V.

    R is never formed for a LoRA: with B = Q S (QR) only Z = RᵀQ and R on the part of C·Z outside of Z's span matter,
    both uniformly random orthonormal frames. Each call draws anew from the generator.
    """

    operator: ScaledGram
    generator: torch.Generator

    def outputs(self, columns: Float[Tensor, "out_features m"]) -> Float[Tensor, "out_features m"]:
        """R C Rᵀ B."""
        size, count = columns.shape
        if 2 * count > size:
            rotation = self._frame(columns, size)
            return (rotation @ self.operator.outputs(rotation.T @ columns.to(rotation)).to(rotation)).to(columns.dtype)
        frame, coordinates = torch.linalg.qr(columns.double())
        seen = self._frame(columns, count)
        image = self.operator.outputs(seen.to(columns.dtype)).double()
        inside = seen.T @ image
        _, outside = torch.linalg.qr(image - seen @ inside)
        fresh = torch.randn(size, count, generator=self.generator, dtype=torch.float64).to(frame)
        elsewhere, _ = torch.linalg.qr(fresh - frame @ (frame.T @ fresh))
        return ((frame @ inside + elsewhere @ outside) @ coordinates).to(columns.dtype)

    def _frame(self, columns: Tensor, count: int) -> Tensor:
        """Uniformly random orthonormal columns, (out, count), fp64."""
        return random_frame(columns.shape[0], count, self.generator).to(columns.device)


def scaled(update: Update, factor: float) -> Update:
    """The update times `factor`, carried by B."""
    return update._replace(b=update.b * factor) if isinstance(update, LoraFactors) else update * factor


class Comparison(NamedTuple):
    """An update before and after a map."""

    similarity: float
    """cos(ΔW, ΔW')."""
    shrinkage: float
    """‖ΔW'‖ / ‖ΔW‖; 1 for an update that was zero."""
    norm: float
    """‖ΔW‖_F."""


def compare(before: Update, after: Update) -> Comparison:
    """Cosine and norms of ΔW and ΔW' from Grams in fp64, without forming BA.

    cos(ΔW, ΔW') = ⟨ΔW, ΔW'⟩_F / (‖ΔW‖ ‖ΔW'‖), with ⟨B₁A₁, B₂A₂⟩ = Σ (B₁ᵀB₂) ∘ (A₁A₂ᵀ), section 3.2. A zero update has
    no direction; its similarity is defined as 0, as in the paper's code. That code takes the cosine of the two
    flattened out × in products in fp32 and rounds it to five decimals.

    Raises:
        ValueError: if an update is not finite.
    """
    inputs = None  # what most operators leave as it is, and what is the largest part of the work
    if isinstance(before, LoraFactors) and isinstance(after, LoraFactors) and before.a is after.a:
        inputs = _inputs(before, after)
    pairs = (before, before), (after, after), (before, after)
    squares = [_inner(x, y, inputs) for x, y in pairs]
    if not all(map(math.isfinite, squares)):
        raise ValueError("the update is not finite")
    norm, norm_after = (math.sqrt(max(0.0, square)) for square in squares[:2])
    product = norm * norm_after
    similarity = 0.0 if product == 0 else max(-1.0, min(1.0, squares[2] / product))
    return Comparison(similarity, norm_after / norm if norm else 1.0, norm)


def update_norm(update: Update) -> float:
    """‖ΔW‖_F, in fp64; of factors from their r × r Grams."""
    if isinstance(update, LoraFactors):
        return math.sqrt(max(0.0, _inner(update, update)))
    return frobenius_norm(update)


def update_similarity(before: Update, after: Update) -> float:
    """The cosine of `compare`."""
    return compare(before, after).similarity


def below(threshold: float) -> Selection:
    """Modules with similarity < threshold, section 3.2. The paper's text says <, its code compares rounded with <=."""
    return lambda similarities: frozenset(name for name, value in similarities.items() if value < threshold)


def lowest(count: int) -> Selection:
    """Exactly the `count` least similar modules; ties go to the name that sorts first.

    Raises:
        ValueError: from the rule, if there are fewer than `count` modules.
    """

    def select(similarities: Mapping[str, float]) -> frozenset[str]:
        if not 0 <= count <= len(similarities):
            raise ValueError(f"lowest {count} of {len(similarities)} modules")
        return frozenset(sorted(similarities, key=lambda name: (similarities[name], name))[:count])

    return select


def every(similarities: Mapping[str, float]) -> frozenset[str]:
    """All modules."""
    return frozenset(similarities)


def _inner(x: Update, y: Update, inputs: Tensor | None = None) -> float:
    """⟨x, y⟩_F; `inputs` is A₁A₂ᵀ in fp64 where it is known already."""
    if isinstance(x, LoraFactors) and isinstance(y, LoraFactors):
        outputs = x.b.double().T @ y.b.double()
        return x.scaling * y.scaling * (outputs * (_inputs(x, y) if inputs is None else inputs)).sum().item()
    if isinstance(x, LoraFactors) or isinstance(y, LoraFactors):
        raise TypeError("factors and a matrix are not compared")
    rows = cached_rows(x)
    blocks = zip(x.split(rows), y.split(rows), strict=True)
    return math.fsum((one.double() * two.double()).sum().item() for one, two in blocks)


def _inputs(x: LoraFactors, y: LoraFactors) -> Tensor:
    a = x.a.double()
    return a @ (a if y.a is x.a else y.a.double()).T
