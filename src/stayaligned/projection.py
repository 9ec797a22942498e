"""Safe LoRA's maths (arXiv 2405.16833, section 3): what an alignment subspace keeps of a LoRA update, and which layers.

V = W_aligned - W_base is one weight's alignment direction, ΔW = scaling·BA one LoRA update. Every operator here maps
the factors (A, B) to new factors of the same rank. Neither ΔW nor any out × out matrix is ever formed: C·B is
V(VᵀB)/‖V‖_F, and norms and cosines of updates live in rank × rank Gram matrices.

Pure functions of tensors. Operators work in the dtype of V (fp32 from a checkpoint); norms and Grams accumulate in
fp64, because an fp32 cosine over the flattened update is off by 1e-3 at width 4096 and is compared with a threshold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING or find_spec("jaxtyping"):  # shapes are checked where jaxtyping is installed: in tests
    from jaxtyping import Float

Side = Literal["left", "right", "both"]
Selection = Callable[[Mapping[str, float]], frozenset[str]]
"""Which modules to change, given the similarity of each."""

_EXACT_SVD_UP_TO = 768
"""Smaller side of V up to which its SVD is computed in full; beyond, the leading part is sampled."""
_OVERSAMPLING = 16
_POWER_ITERATIONS = 6
_SEED = 0


class LoraFactors(NamedTuple):
    """One LoRA update, ΔW = scaling · b @ a."""

    a: Float[Tensor, "rank in_features"]
    b: Float[Tensor, "out_features rank"]
    scaling: float
    """alpha / rank, or alpha / √rank for rank-stabilised LoRA."""


@dataclass(frozen=True, slots=True, eq=False)
class AlignmentSubspace:
    """The k leading left and right singular directions of V: U_k (outputs) and Q_k (inputs), orthonormal columns."""

    left: Float[Tensor, "out_features k"]
    right: Float[Tensor, "in_features k"]
    captured_energy: float
    """‖U_kᵀ V Q_k‖² / ‖V‖², 0 to 1."""

    @property
    def rank(self) -> int:
        """The k."""
        return self.left.shape[1]


class Operator(Protocol):
    """A linear map of updates, in factor form."""

    @property
    def subspace(self) -> AlignmentSubspace | None:
        """The subspace it is built on; None for the paper's C."""
        ...

    def __call__(self, factors: LoraFactors) -> LoraFactors:
        """The mapped update, of the same rank and scaling."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class ScaledGram:
    """The paper's C = V Vᵀ / ‖V‖_F (section 3.4): ΔW ← C ΔW.

    Not a projector: its eigenvalues are σ²/‖V‖_F, so C(cV) = |c|·C(V) and what is left of an update depends on the
    size of V. The paper's code forms C (out × out); here C·B = V(VᵀB)/‖V‖_F, the same matrix for 1/d of the work.
    """

    delta: Float[Tensor, "out_features in_features"]

    @property
    def subspace(self) -> None:
        """None: C weighs all of V's directions."""
        return

    def __call__(self, factors: LoraFactors) -> LoraFactors:
        """B ← V(VᵀB)/‖V‖_F.

        Raises:
            ValueError: if V is zero, where C is 0/0 (the paper's code goes on with NaN).
        """
        norm = frobenius_norm(self.delta)
        if norm == 0:
            raise ValueError("C = V Vᵀ/‖V‖ is undefined for V = 0")
        b = factors.b.to(self.delta.dtype)
        # (BᵀV)ᵀ is VᵀB, read along V's rows: ten times as fast
        return factors._replace(b=self.delta @ (b.T @ self.delta).T / norm)


@dataclass(frozen=True, slots=True, eq=False)
class Orthogonal:
    """The rank-k orthogonal projector ΔW ← U_k U_kᵀ ΔW, idempotent and independent of the size of V.

    Stands in for the paper's "exact" V(VᵀV)⁻¹Vᵀ (equation 2), which is the identity when V is square with full rank.
    """

    subspace: AlignmentSubspace

    def __call__(self, factors: LoraFactors) -> LoraFactors:
        """B ← U_k(U_kᵀB)."""
        return factors._replace(b=_onto(self.subspace.left, factors.b))


@dataclass(frozen=True, slots=True, eq=False)
class Complement:
    """Remove the subspace: ΔW ← (I - U_k U_kᵀ) ΔW (I - Q_k Q_kᵀ), or one side only.

    Not in the paper; of the family of null-space and gradient projections. Idempotent.
    """

    subspace: AlignmentSubspace
    side: Side = "both"
    """`left` acts on the outputs (B), `right` on the inputs (A)."""

    def __call__(self, factors: LoraFactors) -> LoraFactors:
        """B ← B - U_k(U_kᵀB) and A ← A - (A Q_k)Q_kᵀ."""
        a, b = factors.a, factors.b
        if self.side != "right":
            b = b.to(self.subspace.left.dtype) - _onto(self.subspace.left, b)
        if self.side != "left":
            a = a.to(self.subspace.right.dtype) - _onto(self.subspace.right, a.T).T
        return factors._replace(a=a, b=b)


def frobenius_norm(matrix: Float[Tensor, "out_features in_features"]) -> float:
    """‖V‖_F, accumulated in fp64 over blocks of rows that fit the cache, so that no fp64 copy of V is made."""
    rows = max(1, (1 << 18) // max(1, matrix.shape[1]))
    return math.sqrt(sum(block.double().square().sum().item() for block in matrix.split(rows)))


def alignment_subspace(
    delta: Float[Tensor, "out_features in_features"], *, rank: int | None = None, energy: float | None = None
) -> AlignmentSubspace:
    """V's leading singular directions: `rank` of them, or the fewest that hold `energy` of ‖V‖².

    A small V is decomposed in full, a large one by a randomised range finder with power iterations (Halko, Martinsson
    and Tropp 2011) from a fixed seed. A rank above min(out, in), or directions with singular value zero, are left
    out: they would be arbitrary. V = 0 gives the empty subspace.

    Args:
        delta: V.
        rank: the k. Exactly one of `rank` and `energy` is given.
        energy: share of ‖V‖², above 0 and up to 1.

    Raises:
        ValueError: if not exactly one of `rank` and `energy` is given, or it is out of range.
    """
    if (rank is None) == (energy is None):
        raise ValueError("give exactly one of rank and energy")
    if (rank is not None and rank < 1) or (energy is not None and not 0 < energy <= 1):
        raise ValueError("rank must be at least 1, energy above 0 and at most 1")
    full, total = min(delta.shape), frobenius_norm(delta) ** 2
    target = 1.0 if energy is None else energy * (1 - 1e-9)  # the fp32 spectrum may sum to a hair below 1
    tried = rank if rank is not None else 64
    while True:
        left, values, right = _leading_svd(delta, min(tried, full))
        cumulated = values.double().square().cumsum(0) / max(total, torch.finfo(torch.float64).tiny)
        reached = rank is not None or tried >= full or (len(cumulated) > 0 and cumulated[-1].item() >= target)
        if reached:
            break
        tried *= 2
    floor = torch.finfo(values.dtype).eps * max(delta.shape) * (values[0].item() if len(values) else 0.0)
    k = int((values > floor).sum().item())
    if energy is not None:
        k = min(k, int((cumulated < target).sum().item()) + 1)
    captured = min(1.0, cumulated[k - 1].item()) if k else 0.0
    return AlignmentSubspace(left[:, :k].contiguous(), right[:, :k].contiguous(), captured)


def random_subspace(
    delta: Float[Tensor, "out_features in_features"], rank: int, generator: torch.Generator
) -> AlignmentSubspace:
    """`rank` uniformly random orthonormal directions on each side: the control for a subspace of the same size."""
    left, right = (
        torch.linalg.qr(torch.randn(size, rank, generator=generator, dtype=torch.float64))[0].to(delta)
        for size in delta.shape
    )
    total = frobenius_norm(delta) ** 2
    captured = frobenius_norm(left.T @ delta @ right) ** 2 / total if total else 0.0
    return AlignmentSubspace(left, right, captured)


def scaled(factors: LoraFactors, factor: float) -> LoraFactors:
    """The update times `factor`, carried by B."""
    return factors._replace(b=factors.b * factor)


def update_norm(factors: LoraFactors) -> float:
    """‖scaling·BA‖_F from the r × r Grams in fp64, without forming BA."""
    return math.sqrt(max(0.0, _inner(factors, factors)))


def update_similarity(before: LoraFactors, after: LoraFactors) -> float:
    """cos(ΔW, ΔW') = ⟨ΔW, ΔW'⟩_F / (‖ΔW‖ ‖ΔW'‖), with ⟨B₁A₁, B₂A₂⟩ = Σ (B₁ᵀB₂) ∘ (A₁A₂ᵀ), section 3.2.

    A zero update has no direction; its similarity is defined as 0, as in the paper's code. That code takes the cosine
    of the two flattened out × in products in fp32 and rounds it to five decimals.
    """
    norms = update_norm(before) * update_norm(after)
    return 0.0 if norms == 0 else max(-1.0, min(1.0, _inner(before, after) / norms))


def shrinkage(before: LoraFactors, after: LoraFactors) -> float:
    """‖ΔW'‖ / ‖ΔW‖: what is left of the update; 1 for an update that was zero."""
    norm = update_norm(before)
    return update_norm(after) / norm if norm else 1.0


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


def _onto(basis: Float[Tensor, "size k"], columns: Float[Tensor, "size rank"]) -> Float[Tensor, "size rank"]:
    return basis @ (basis.T @ columns.to(basis.dtype))


def _inner(x: LoraFactors, y: LoraFactors) -> float:
    grams = (x.b.double().T @ y.b.double()) * (x.a.double() @ y.a.double().T)
    return x.scaling * y.scaling * grams.sum().item()


def _leading_svd(
    delta: Float[Tensor, "out_features in_features"], rank: int
) -> tuple[Float[Tensor, "out_features k"], Float[Tensor, " k"], Float[Tensor, "in_features k"]]:
    if min(delta.shape) <= _EXACT_SVD_UP_TO or 4 * rank >= min(delta.shape):
        left, values, right = torch.linalg.svd(delta, full_matrices=False)
        return left[:, :rank], values[:rank], right[:rank].T
    with torch.random.fork_rng(devices=[]):  # svd_lowrank takes no generator
        torch.manual_seed(_SEED)
        left, values, right = torch.svd_lowrank(delta, q=rank + _OVERSAMPLING, niter=_POWER_ITERATIONS)
    return left[:, :rank], values[:rank], right[:, :rank]
