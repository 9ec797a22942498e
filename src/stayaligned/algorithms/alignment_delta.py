"""The alignment delta V = W_aligned - W_base of one weight, full or truncated, and its leading subspaces.

Pure functions of tensors. Products work in the dtype of V (fp32 from a checkpoint); norms accumulate in fp64.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stayaligned.core.errors import StayalignedError

if TYPE_CHECKING or find_spec("jaxtyping"):  # shapes are checked where jaxtyping is installed: in tests
    from jaxtyping import Float

_EXACT_SVD_UP_TO = 768
"""Smaller side of V up to which its SVD is computed in full; above, the leading part is sampled."""
_OVERSAMPLING = 16
_POWER_ITERATIONS = 5
_MOST_BASIS_COLUMNS = 640
"""Number of columns up to which the sampled basis includes all iterates."""
_SEED = 0
_TAIL_STEPS, _TAIL_VECTORS, _TAIL_FACTOR = 32, 8, 20.0
"""Steps p, vectors r and factor α of `measure_tail`."""


@dataclass(frozen=True, slots=True, eq=False)
class AlignmentSubspace:
    """The k leading left and right singular directions of V: U_k (outputs) and Q_k (inputs), orthonormal columns."""

    left: Float[Tensor, "out_features k"]
    right: Float[Tensor, "in_features k"]
    captured_energy: float
    """‖U_kᵀ V Q_k‖² / ‖V‖², 0 to 1."""

    @property
    def rank(self) -> int:
        """The number k of directions."""
        return self.left.shape[1]


class AlignmentDelta(ABC):
    """V of one weight: in full, or its leading part as a subspace file stores it."""

    norm: float
    """‖V‖_F of the full V."""
    rounding: bool
    """Whether V is only what rounding the weights to another type changes, and so no direction."""

    @abstractmethod
    def gram(self, columns: Float[Tensor, "out_features m"]) -> Float[Tensor, "out_features m"]:
        """Compute V(Vᵀx)."""

    @abstractmethod
    def core(
        self, left: Float[Tensor, "out_features k"], right: Float[Tensor, "in_features k"]
    ) -> Float[Tensor, "k k"]:
        """Compute LᵀVR."""

    @abstractmethod
    def subspace(self, *, rank: int | None = None, energy: float | None = None) -> AlignmentSubspace:
        """Return V's `rank` leading directions, or the fewest that capture `energy` of ‖V‖².

        Raises:
            ValueError: if not exactly one of the two is given, or this form of V captures too little.
        """

    @property
    def largest_missing(self) -> float | None:
        """A bound on the squared singular values that this form leaves out; None for the full V."""
        return None


@dataclass(frozen=True, eq=False)
class FullDelta(AlignmentDelta):
    """V as a full matrix."""

    matrix: Float[Tensor, "out_features in_features"]
    norm: float
    """‖V‖_F."""
    rounding: bool = False

    @classmethod
    def from_matrix(cls, matrix: Float[Tensor, "out_features in_features"]) -> FullDelta:
        """Wrap V and compute its norm."""
        return cls(matrix, frobenius_norm(matrix))

    def gram(self, columns: Float[Tensor, "out_features m"]) -> Float[Tensor, "out_features m"]:
        """Compute V(Vᵀx), with both products along V's rows, which is twice as fast for few columns."""
        columns = columns.to(self.matrix.dtype)
        if columns.shape[1] > len(self.matrix):  # a full matrix: the Gram matrix is the smaller product
            return (self.matrix @ self.matrix.T) @ columns
        return ((columns.T @ self.matrix) @ self.matrix.T).T

    def core(
        self, left: Float[Tensor, "out_features k"], right: Float[Tensor, "in_features k"]
    ) -> Float[Tensor, "k k"]:
        """Compute LᵀVR."""
        return left.T @ self.matrix @ right

    def subspace(self, *, rank: int | None = None, energy: float | None = None) -> AlignmentSubspace:
        """Return the directions of `alignment_subspace`."""
        return alignment_subspace(self.matrix, rank=rank, energy=energy)


@dataclass(frozen=True, slots=True)
class Tail:
    """What triplets U, Σ, Q leave out of V: E = V - U Uᵀ V."""

    largest: float
    """A bound on ‖E‖₂, the largest singular value that is left out."""
    cross: float
    """‖E Q Σ‖_F: 0 for exact triplets, and small for sampled ones."""


@dataclass(frozen=True, eq=False)
class TruncatedDelta(AlignmentDelta):
    """V's leading singular triplets, V ≈ U Σ Qᵀ, with the norm of the full V."""

    left: Float[Tensor, "out_features k"]
    values: Float[Tensor, " k"]
    """Singular values σ, largest first."""
    right: Float[Tensor, "in_features k"]
    norm: float
    tail: Tail | None = None
    """What the triplets leave out; None assumes exact triplets, of which the last bounds the next."""
    rounding: bool = False

    @property
    def captured_energy(self) -> float:
        """Σσ² / ‖V‖², 0 to 1; 0 for V = 0."""
        return min(1.0, self.values.double().square().sum().item() / self.norm**2) if self.norm else 0.0

    def to(self, device: str) -> TruncatedDelta:
        """Return the triplets on another device."""
        return replace(self, left=self.left.to(device), values=self.values.to(device), right=self.right.to(device))

    def gram(self, columns: Float[Tensor, "out_features m"]) -> Float[Tensor, "out_features m"]:
        """Compute U Σ² (Uᵀx), along U's rows as in `FullDelta`."""
        return (((columns.to(self.left.dtype).T @ self.left) * self.values.square()) @ self.left.T).T

    def core(
        self, left: Float[Tensor, "out_features k2"], right: Float[Tensor, "in_features k2"]
    ) -> Float[Tensor, "k2 k2"]:
        """Compute Lᵀ(UΣQᵀ)R."""
        return ((left.T @ self.left) * self.values) @ (self.right.T @ right)

    def subspace(self, *, rank: int | None = None, energy: float | None = None) -> AlignmentSubspace:
        """Return a prefix of the stored directions; all of them if they capture all of V.

        Raises:
            ValueError: if not exactly one of `rank` and `energy` is given.
            StayalignedError: if the stored directions capture too little.
        """
        if (rank is None) == (energy is None):
            raise ValueError("give exactly one of rank and energy")
        if self.norm == 0:
            return AlignmentSubspace(self.left[:, :0], self.right[:, :0], 0.0)
        cumulated = (self.values.double().square().cumsum(0) / self.norm**2).clamp(max=1.0)
        stored = len(self.values)
        if energy is not None:
            rank = int((cumulated < energy * (1 - 1e-9)).sum().item()) + 1
        k = min(rank or 0, stored)
        captured = cumulated[k - 1].item() if k else 0.0
        # Directions that capture all of V are enough, even if fewer than required.
        if (rank or 0) > stored and captured < 1 - 1e-6:
            required = f"{energy:.0%} of V's energy" if energy is not None else f"{rank} directions"
            raise StayalignedError(
                f"{required} required, but {stored} directions with {captured:.1%} of V's energy are stored",
                hint="Lower rank or energy, or build the subspace file with a larger --rank or --energy.",
            )
        return AlignmentSubspace(self.left[:, :k], self.right[:, :k], captured)

    @property
    def largest_missing(self) -> float:
        """The square of `tail.largest`; else the bound min(σ_k², ‖V‖² - Σσ²): the next σ² exceeds neither."""
        if self.tail is not None:
            return self.tail.largest**2
        squares = self.values.double().square()
        rest = max(0.0, self.norm**2 - squares.sum().item())
        return min(squares[-1].item(), rest) if len(squares) else rest


def frobenius_norm(matrix: Float[Tensor, "out_features in_features"]) -> float:
    """Compute ‖V‖_F in fp64 over blocks of rows that fit the cache, so that no fp64 copy of V is made."""
    return math.sqrt(math.fsum(block.double().square().sum().item() for block in matrix.split(cached_rows(matrix))))


def alignment_subspace(
    delta: Float[Tensor, "out_features in_features"], *, rank: int | None = None, energy: float | None = None
) -> AlignmentSubspace:
    """Return the directions of V's `leading_triplets`, which documents the arguments.

    Raises:
        ValueError: if not exactly one of `rank` and `energy` is given, or it is out of range.
    """
    leading = leading_triplets(delta, rank=rank, energy=energy)
    return AlignmentSubspace(leading.left, leading.right, leading.captured_energy)


def leading_triplets(
    delta: Float[Tensor, "out_features in_features"], *, rank: int | None = None, energy: float | None = None
) -> TruncatedDelta:
    """Compute V's leading singular triplets: the first `rank`, or the fewest that capture `energy` of ‖V‖².

    A small V is decomposed in full, a large one by randomized block Krylov iteration (Musco and Musco 2015) from a
    fixed seed: neighboring singular values of fine-tuning differences are close, and power iterations alone would
    separate them slowly. Ranks above min(out, in) and triplets with singular value zero are left out, because their
    directions would be arbitrary. V = 0 has no triplets.

    Args:
        delta: V.
        rank: number of triplets (k). Give exactly one of `rank` and `energy`.
        energy: share of ‖V‖², above 0 and at most 1.

    Raises:
        ValueError: if not exactly one of `rank` and `energy` is given, or it is out of range.
    """
    if (rank is None) == (energy is None):
        raise ValueError("give exactly one of rank and energy")
    if (rank is not None and rank < 1) or (energy is not None and not 0 < energy <= 1):
        raise ValueError("rank must be at least 1, energy above 0 and at most 1")
    full, norm = min(delta.shape), frobenius_norm(delta)
    target = 1.0 if energy is None else energy * (1 - 1e-9)  # the fp32 spectrum may sum to a hair below 1
    tried = rank if rank is not None else 64
    while True:
        left, values, right, following = _leading_svd(delta, min(tried, full))
        cumulated = values.double().square().cumsum(0) / max(norm**2, torch.finfo(torch.float64).tiny)
        reached = rank is not None or tried >= full or (len(cumulated) > 0 and cumulated[-1].item() >= target)
        if reached:
            break
        tried *= 2
    floor = torch.finfo(values.dtype).eps * max(delta.shape) * (values[0].item() if len(values) else 0.0)
    k = int((values > floor).sum().item())
    if energy is not None:
        k = min(k, int((cumulated < target).sum().item()) + 1)
    exact = None if following is None else Tail((*values.tolist(), following)[k], 0.0)
    return TruncatedDelta(left[:, :k].contiguous(), values[:k].contiguous(), right[:, :k].contiguous(), norm, exact)


def measure_tail(delta: Float[Tensor, "out_features in_features"], triplets: TruncatedDelta) -> TruncatedDelta:
    """Return the triplets with their `tail`, which a full decomposition gives and sampling does not.

    ‖E‖₂² is bounded by p steps of the block power method on EEᵀ from r Gaussian vectors ω: ‖(EEᵀ)^p‖₂ is at most
    α √(2/π) max ‖(EEᵀ)^p ω‖, except with probability α^-r (Halko, Martinsson and Tropp 2011, lemma 4.1). Here p = 32,
    r = 8 and α = 20 (probability 4e-11); the p-th root makes the bound 10 to 25 % larger than ‖E‖₂².

    Args:
        delta: V.
        triplets: what `leading_triplets` returned for it.
    """
    if triplets.tail is not None:
        return triplets
    left = triplets.left

    def without_left(columns: Tensor) -> Tensor:
        return columns - left @ (left.T @ columns)

    cross = frobenius_norm(without_left(delta @ triplets.right) * triplets.values)
    generator = torch.Generator().manual_seed(_SEED)
    start = torch.randn(delta.shape[0], _TAIL_VECTORS, generator=generator, dtype=torch.float64)
    power, scale = without_left(start.to(delta)), 0.0  # the power method's columns are power · exp(scale)
    for _ in range(_TAIL_STEPS):
        power = without_left(delta @ (delta.T @ power))
        size = power.norm(dim=0).max().item()
        if size == 0:
            return replace(triplets, tail=Tail(0.0, cross))
        power, scale = power / size, scale + math.log(size)
    scale += math.log(_TAIL_FACTOR * math.sqrt(2 / math.pi))
    return replace(triplets, tail=Tail(math.exp(scale / (2 * _TAIL_STEPS)), cross))


def no_triplets(delta: Float[Tensor, "out_features in_features"]) -> TruncatedDelta:
    """Return the norm of a V that is only rounding, without any direction."""
    rows, columns = delta.shape
    nothing = delta.new_empty(rows, 0), delta.new_empty(0), delta.new_empty(columns, 0)
    return TruncatedDelta(*nothing, frobenius_norm(delta), Tail(0.0, 0.0), rounding=True)


def random_subspace(delta: AlignmentDelta, like: AlignmentSubspace, generator: torch.Generator) -> AlignmentSubspace:
    """Draw uniformly random orthonormal directions, as many as `like` has, as the control for that subspace."""
    left, right = (random_frame(side.shape[0], like.rank, generator).to(side) for side in (like.left, like.right))
    captured = (frobenius_norm(delta.core(left, right)) / delta.norm) ** 2 if delta.norm else 0.0
    return AlignmentSubspace(left, right, captured)


def project_columns(basis: Float[Tensor, "size k"], columns: Float[Tensor, "size rank"]) -> Float[Tensor, "size rank"]:
    """Project columns orthogonally onto the span of an orthonormal basis."""
    return ((columns.to(basis.dtype).T @ basis) @ basis.T).T  # along the basis' rows, as in `FullDelta.gram`


def cached_rows(matrix: Tensor) -> int:
    """Return how many rows of a matrix fit the cache in fp64, in blocks small enough for the allocator to reuse."""
    return max(1, (1 << 15) // max(1, matrix.shape[1]))


def layer_generator(seed: int, layer: str) -> torch.Generator:
    """Return the generator of one layer's random directions, which differ between layers and seeds."""
    digest = hashlib.sha256(f"{seed}/{layer}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def random_frame(size: int, count: int, generator: torch.Generator) -> Tensor:
    """Draw uniformly random orthonormal columns, (size, count), fp64: QR of a Gaussian, R's diagonal made positive."""
    frame, triangle = torch.linalg.qr(torch.randn(size, count, generator=generator, dtype=torch.float64))
    return frame * torch.where(triangle.diagonal() < 0, -1.0, 1.0)


def _leading_svd(
    delta: Float[Tensor, "out_features in_features"], rank: int
) -> tuple[Float[Tensor, "out_features k"], Float[Tensor, " k"], Float[Tensor, "in_features k"], float | None]:
    """Return the leading triplets, and the singular value that follows them; None if they are sampled."""
    if min(delta.shape) <= _EXACT_SVD_UP_TO or 4 * rank >= min(delta.shape):
        left, values, right = torch.linalg.svd(delta, full_matrices=False)
        following = values[rank].item() if rank < len(values) else 0.0
        return left[:, :rank], values[:rank], right[:rank].T, following
    basis = _sampled_range(delta, rank + _OVERSAMPLING)
    left, values, right = torch.linalg.svd(basis.T @ delta, full_matrices=False)
    return basis @ left[:, :rank], values[:rank], right[:rank].T, None


def _sampled_range(delta: Float[Tensor, "out_features in_features"], width: int) -> Float[Tensor, "out_features m"]:
    """Compute orthonormal columns that nearly span V's leading left directions.

    The random numbers come from a generator of this call: `torch.svd_lowrank` uses the global one, which threads that
    work on different V would share.
    """
    generator = torch.Generator().manual_seed(_SEED)
    sample = torch.randn(delta.shape[1], width, generator=generator, dtype=delta.dtype).to(delta.device)
    iterates = [torch.linalg.qr(delta @ sample).Q]
    for _ in range(_POWER_ITERATIONS):
        back = torch.linalg.qr(delta.T @ iterates[-1]).Q
        iterates.append(torch.linalg.qr(delta @ back).Q)
    return torch.linalg.qr(torch.cat(iterates[-max(1, _MOST_BASIS_COLUMNS // width) :], dim=1)).Q
