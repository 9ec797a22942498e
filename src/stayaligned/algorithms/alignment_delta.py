"""Directions of alignment: V = W_aligned - W_base of one weight, whole or truncated, and its leading subspaces.

Pure functions of tensors. Products work in the dtype of V (fp32 from a checkpoint); norms accumulate in fp64.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stayaligned.core.errors import StayalignedError

if TYPE_CHECKING or find_spec("jaxtyping"):  # shapes are checked where jaxtyping is installed: in tests
    from jaxtyping import Float

_EXACT_SVD_UP_TO = 768
"""Smaller side of V up to which its SVD is computed in full; beyond, the leading part is sampled."""
_OVERSAMPLING = 16
_POWER_ITERATIONS = 5
_MOST_BASIS_COLUMNS = 640
"""Width up to which the sampled basis keeps every iterate."""
_SEED = 0


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


class AlignmentDelta(ABC):
    """V of one weight: in full, or its leading part as a subspace file keeps it."""

    norm: float
    """‖V‖_F, of the whole V."""

    @abstractmethod
    def gram(self, columns: Float[Tensor, "out_features m"]) -> Float[Tensor, "out_features m"]:
        """V(Vᵀx)."""

    @abstractmethod
    def core(
        self, left: Float[Tensor, "out_features k"], right: Float[Tensor, "in_features k"]
    ) -> Float[Tensor, "k k"]:
        """LᵀVR."""

    @abstractmethod
    def subspace(self, *, rank: int | None = None, energy: float | None = None) -> AlignmentSubspace:
        """V's `rank` leading directions, or the fewest that hold `energy` of ‖V‖².

        Raises:
            ValueError: if not exactly one of the two is given, or this form of V holds too little.
        """

    @property
    def largest_missing(self) -> float | None:
        """A bound on the squared singular values that this form leaves out; None if V is whole."""
        return None


@dataclass(frozen=True, eq=False)
class FullDelta(AlignmentDelta):
    """V as a matrix."""

    matrix: Float[Tensor, "out_features in_features"]
    norm: float
    """‖V‖_F."""

    @classmethod
    def of(cls, matrix: Float[Tensor, "out_features in_features"]) -> FullDelta:
        """V with its norm."""
        return cls(matrix, frobenius_norm(matrix))

    def gram(self, columns: Float[Tensor, "out_features m"]) -> Float[Tensor, "out_features m"]:
        """V(Vᵀx), written so that both products run along V's rows: twice as fast for few columns."""
        columns = columns.to(self.matrix.dtype)
        if columns.shape[1] > len(self.matrix):  # a whole update: the Gram matrix is the smaller product
            return (self.matrix @ self.matrix.T) @ columns
        return ((columns.T @ self.matrix) @ self.matrix.T).T

    def core(
        self, left: Float[Tensor, "out_features k"], right: Float[Tensor, "in_features k"]
    ) -> Float[Tensor, "k k"]:
        """LᵀVR."""
        return left.T @ self.matrix @ right

    def subspace(self, *, rank: int | None = None, energy: float | None = None) -> AlignmentSubspace:
        """By `alignment_subspace`."""
        return alignment_subspace(self.matrix, rank=rank, energy=energy)


@dataclass(frozen=True, eq=False)
class TruncatedDelta(AlignmentDelta):
    """V's leading singular triplets, V ≈ U Σ Qᵀ, with the norm of the whole V."""

    left: Float[Tensor, "out_features k"]
    values: Float[Tensor, " k"]
    """σ, largest first."""
    right: Float[Tensor, "in_features k"]
    norm: float

    @property
    def captured_energy(self) -> float:
        """Σσ² / ‖V‖², 0 to 1; 0 for V = 0."""
        return min(1.0, self.values.double().square().sum().item() / self.norm**2) if self.norm else 0.0

    def to(self, device: str) -> TruncatedDelta:
        """The same on another device."""
        return TruncatedDelta(self.left.to(device), self.values.to(device), self.right.to(device), self.norm)

    def gram(self, columns: Float[Tensor, "out_features m"]) -> Float[Tensor, "out_features m"]:
        """U Σ² (Uᵀx), along U's rows as in `FullDelta`."""
        return (((columns.to(self.left.dtype).T @ self.left) * self.values.square()) @ self.left.T).T

    def core(
        self, left: Float[Tensor, "out_features k2"], right: Float[Tensor, "in_features k2"]
    ) -> Float[Tensor, "k2 k2"]:
        """Lᵀ(UΣQᵀ)R."""
        return ((left.T @ self.left) * self.values) @ (self.right.T @ right)

    def subspace(self, *, rank: int | None = None, energy: float | None = None) -> AlignmentSubspace:
        """A prefix of the stored directions; all of them where they hold all of V.

        Raises:
            ValueError: if not exactly one of `rank` and `energy` is given.
            StayalignedError: if the stored directions hold too little.
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
        held = cumulated[k - 1].item() if k else 0.0
        # Fewer stored than asked for is all there is, if they hold all of V.
        if (rank or 0) > stored and held < 1 - 1e-6:
            wanted = f"{energy:.0%} of V's energy" if energy is not None else f"{rank} directions"
            raise StayalignedError(
                f"{wanted} asked for, but {stored} directions with {held:.1%} of V's energy are stored",
                hint="Ask for less, or build the subspace file with a larger --rank or --energy.",
            )
        return AlignmentSubspace(self.left[:, :k], self.right[:, :k], held)

    @property
    def largest_missing(self) -> float:
        """min(σ_k², ‖V‖² - Σσ²): the next σ² is no larger than either."""
        squares = self.values.double().square()
        rest = max(0.0, self.norm**2 - squares.sum().item())
        return min(squares[-1].item(), rest) if len(squares) else rest


def frobenius_norm(matrix: Float[Tensor, "out_features in_features"]) -> float:
    """‖V‖_F, accumulated in fp64 over blocks of rows that fit the cache, so that no fp64 copy of V is made."""
    return math.sqrt(math.fsum(block.double().square().sum().item() for block in matrix.split(cached_rows(matrix))))


def alignment_subspace(
    delta: Float[Tensor, "out_features in_features"], *, rank: int | None = None, energy: float | None = None
) -> AlignmentSubspace:
    """The directions of V's `leading_triplets`.

    Raises:
        ValueError: as there.
    """
    leading = leading_triplets(delta, rank=rank, energy=energy)
    return AlignmentSubspace(leading.left, leading.right, leading.captured_energy)


def leading_triplets(
    delta: Float[Tensor, "out_features in_features"], *, rank: int | None = None, energy: float | None = None
) -> TruncatedDelta:
    """V's leading singular triplets: `rank` of them, or the fewest that hold `energy` of ‖V‖².

    A small V is decomposed in full, a large one by randomised block Krylov iteration (Musco and Musco 2015) from a
    fixed seed: in fine-tuning differences neighboring singular values are close, and power iterations alone would
    take long to tell them apart. A rank above min(out, in), or triplets with singular value zero, are left out: their
    directions would be arbitrary. V = 0 gives none.

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
    full, norm = min(delta.shape), frobenius_norm(delta)
    target = 1.0 if energy is None else energy * (1 - 1e-9)  # the fp32 spectrum may sum to a hair below 1
    tried = rank if rank is not None else 64
    while True:
        left, values, right = _leading_svd(delta, min(tried, full))
        cumulated = values.double().square().cumsum(0) / max(norm**2, torch.finfo(torch.float64).tiny)
        reached = rank is not None or tried >= full or (len(cumulated) > 0 and cumulated[-1].item() >= target)
        if reached:
            break
        tried *= 2
    floor = torch.finfo(values.dtype).eps * max(delta.shape) * (values[0].item() if len(values) else 0.0)
    k = int((values > floor).sum().item())
    if energy is not None:
        k = min(k, int((cumulated < target).sum().item()) + 1)
    return TruncatedDelta(left[:, :k].contiguous(), values[:k].contiguous(), right[:, :k].contiguous(), norm)


def random_subspace(delta: AlignmentDelta, like: AlignmentSubspace, generator: torch.Generator) -> AlignmentSubspace:
    """Uniformly random orthonormal directions, as many as `like` has: the control for a subspace of the same size."""
    left, right = (random_frame(side.shape[0], like.rank, generator).to(side) for side in (like.left, like.right))
    captured = (frobenius_norm(delta.core(left, right)) / delta.norm) ** 2 if delta.norm else 0.0
    return AlignmentSubspace(left, right, captured)


def onto(basis: Float[Tensor, "size k"], columns: Float[Tensor, "size rank"]) -> Float[Tensor, "size rank"]:
    """The orthogonal projection of columns onto the span of an orthonormal basis."""
    return ((columns.to(basis.dtype).T @ basis) @ basis.T).T  # along the basis' rows, as in `FullDelta.gram`


def cached_rows(matrix: Tensor) -> int:
    """How many rows of a matrix fit the cache in fp64, and small enough for the allocator to keep their room."""
    return max(1, (1 << 15) // max(1, matrix.shape[1]))


def random_frame(size: int, count: int, generator: torch.Generator) -> Tensor:
    """Uniformly random orthonormal columns, (size, count), fp64: QR of a Gaussian, R's diagonal made positive."""
    frame, triangle = torch.linalg.qr(torch.randn(size, count, generator=generator, dtype=torch.float64))
    return frame * torch.where(triangle.diagonal() < 0, -1.0, 1.0)


def _leading_svd(
    delta: Float[Tensor, "out_features in_features"], rank: int
) -> tuple[Float[Tensor, "out_features k"], Float[Tensor, " k"], Float[Tensor, "in_features k"]]:
    if min(delta.shape) <= _EXACT_SVD_UP_TO or 4 * rank >= min(delta.shape):
        left, values, right = torch.linalg.svd(delta, full_matrices=False)
        return left[:, :rank], values[:rank], right[:rank].T
    basis = _sampled_range(delta, rank + _OVERSAMPLING)
    left, values, right = torch.linalg.svd(basis.T @ delta, full_matrices=False)
    return basis @ left[:, :rank], values[:rank], right[:rank].T


def _sampled_range(delta: Float[Tensor, "out_features in_features"], width: int) -> Float[Tensor, "out_features m"]:
    """Orthonormal columns that nearly span V's leading left directions, from a generator of their own.

    `torch.svd_lowrank` draws from the global one, which several threads at work on different V would share.
    """
    generator = torch.Generator().manual_seed(_SEED)
    sample = torch.randn(delta.shape[1], width, generator=generator, dtype=delta.dtype).to(delta.device)
    iterates = [torch.linalg.qr(delta @ sample).Q]
    for _ in range(_POWER_ITERATIONS):
        back = torch.linalg.qr(delta.T @ iterates[-1]).Q
        iterates.append(torch.linalg.qr(delta @ back).Q)
    return torch.linalg.qr(torch.cat(iterates[-max(1, _MOST_BASIS_COLUMNS // width) :], dim=1)).Q
