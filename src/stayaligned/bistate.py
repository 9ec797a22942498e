"""Lisa's maths (arXiv 2405.18641): which state a step is in, which rows it takes, and the pull to the anchor.

Everything here is a pure function of the optimizer step and a seed, so that a resumed run, a run on more processes
and a run with another accumulation count go the same way.
"""

# torch's multi-tensor operations are documented by name only under an underscore.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

import torch
from torch import Tensor

from stayaligned.errors import StayalignedError

Anchor = Mapping[str, Tensor]
"""The trainable weights, by name, as they were when the current state began."""

_CHUNK_ELEMENTS = 1 << 26
"""Weights whose difference is held at once: 256 MiB in fp32, however large the model."""


class Phase(StrEnum):
    """The two states of bi-state optimization."""

    ALIGNMENT = "alignment"
    FINETUNING = "finetuning"


@dataclass(frozen=True, slots=True)
class RowStream:
    """An endless shuffled stream over `size` rows: one fresh permutation per pass, without a gap between passes."""

    size: int
    seed: int
    name: str
    """Tells apart the streams of one seed."""

    def take(self, start: int, count: int) -> list[int]:
        """The rows at positions `start` … `start + count - 1` of the stream."""
        return [self._permutation(at // self.size)[at % self.size] for at in range(start, start + count)]

    def _permutation(self, epoch: int) -> list[int]:
        return _permutation(self.size, f"{self.name}/{self.seed}/{epoch}")


@lru_cache(maxsize=4)  # two streams, each at most between two passes
def _permutation(size: int, key: str) -> list[int]:
    # A hash, because neighbouring integer seeds of two streams would repeat each other's permutations.
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big")
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed)).tolist()


@dataclass(frozen=True, slots=True)
class BiStateSchedule:
    """K1 steps on alignment data, then K2 steps on the user's, and so on (Lisa, Algorithms 1 and 2).

    A step is an optimizer step. The published code counts micro-batches, so that its states switch in the middle of
    an accumulated gradient.

    Example:
        >>> schedule = BiStateSchedule(alignment_steps=1, finetuning_steps=2)
        >>> [str(schedule.phase_at(step)) for step in range(4)]
        ['alignment', 'finetuning', 'finetuning', 'alignment']

    Args:
        alignment_steps: K1; 0 leaves only the pull to the initial weights.
        finetuning_steps: K2.

    Raises:
        StayalignedError: if one is negative or both are 0.
    """

    alignment_steps: int
    finetuning_steps: int

    def __post_init__(self) -> None:
        if min(self.alignment_steps, self.finetuning_steps) < 0 or self.cycle_steps == 0:
            raise StayalignedError(
                f"alignment_steps={self.alignment_steps} and finetuning_steps={self.finetuning_steps} make no schedule",
                hint="Give numbers of optimizer steps, 0 or more, not both 0. The paper takes 100 and 900.",
            )

    @property
    def cycle_steps(self) -> int:
        """K1 + K2."""
        return self.alignment_steps + self.finetuning_steps

    def phase_at(self, step: int) -> Phase:
        """The state of optimizer step `step` (counted from 0)."""
        return Phase.ALIGNMENT if step % self.cycle_steps < self.alignment_steps else Phase.FINETUNING

    def switches_at(self, step: int) -> bool:
        """Whether `step` is the first of a state that follows another; never, where one of them has no steps."""
        return step > 0 and self.phase_at(step) != self.phase_at(step - 1)

    def steps_before(self, step: int, phase: Phase) -> int:
        """How many of the steps 0 … `step - 1` are in `phase`."""
        cycles, rest = divmod(step, self.cycle_steps)
        alignment = cycles * self.alignment_steps + min(rest, self.alignment_steps)
        return alignment if phase is Phase.ALIGNMENT else step - alignment

    def steps_to_cover(self, finetuning_steps: int) -> int:
        """The fewest steps among which, wherever they start, at least `finetuning_steps` are fine-tuning steps.

        Raises:
            StayalignedError: if this schedule never fine-tunes.
        """
        if self.finetuning_steps == 0:
            raise StayalignedError(
                "budget='cover' asks for every user row, but finetuning_steps=0 takes none",
                hint="Set finetuning_steps, or budget='shared'.",
            )
        return finetuning_steps + math.ceil(finetuning_steps / self.finetuning_steps) * self.alignment_steps

    def indices_at(self, step: int, *, rows_per_step: int, finetuning: RowStream, alignment: RowStream) -> list[int]:
        """The rows that optimizer step `step` takes: all from one stream, which goes on where its last step ended.

        Returns:
            `rows_per_step` indices into the user's rows followed by the alignment rows.
        """
        phase = self.phase_at(step)
        start = self.steps_before(step, phase) * rows_per_step
        if phase is Phase.FINETUNING:
            return finetuning.take(start, rows_per_step)
        return [finetuning.size + index for index in alignment.take(start, rows_per_step)]


def take_anchor(params: Mapping[str, Tensor]) -> Anchor:
    """A copy of the weights, to be pulled back to."""
    return {name: param.detach().clone() for name, param in params.items()}


def add_proximal_gradient_(params: Mapping[str, Tensor], anchor: Anchor, rho: float, *, scale: float = 1.0) -> None:
    """Add the gradient of the proximal term to `param.grad`, in place.

    ∇ ρ/2·‖w − w_anchor‖² = ρ·(w − w_anchor)   (Lisa, Algorithm 2 and equation 2)

    The published code adds the term to the loss of every micro-batch. As a gradient it is added once per optimizer
    step, after the gradients are summed and before they are clipped, which is the same arithmetic and needs no
    second graph. The difference is taken in fp32 at least. A weight that the loss did not reach gets a gradient too.

    Args:
        params: the trainable weights by name.
        anchor: the same names, shapes and types.
        rho: ρ, the strength of the pull.
        scale: what the loss was multiplied by before its backward pass (a gradient scaler's factor).

    Raises:
        StayalignedError: if the names differ.
    """
    for chunk in _differences(params, anchor):
        weights, differences = zip(*chunk, strict=True)
        for weight in weights:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
        torch._foreach_add_([weight.grad for weight in weights], differences, alpha=rho * scale)


def drift(params: Mapping[str, Tensor], anchor: Anchor) -> Tensor:
    """‖w − w_anchor‖, the Euclidean norm over all weights; a scalar.

    The published code prints its square, and the paper plots it.

    Raises:
        StayalignedError: if the names differ.
    """
    norms = [
        torch.stack([norm.double() for norm in torch._foreach_norm([difference for _, difference in chunk])])
        for chunk in _differences(params, anchor)
    ]
    return torch.linalg.vector_norm(torch.cat(norms))


def _differences(params: Mapping[str, Tensor], anchor: Anchor) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """(weight, weight − anchor) in chunks, paired by name, in fp32 where the weights are stored in less."""
    if params.keys() != anchor.keys():
        missing, extra = sorted(params.keys() - anchor.keys()), sorted(anchor.keys() - params.keys())
        raise StayalignedError(
            f"the trainable weights are not those of the anchor: without an anchor {missing}, not trained {extra}",
            hint="Freeze and unfreeze weights before training starts.",
        )
    for chunk in _chunks(params):
        with torch.no_grad():
            weights = [_at_least_fp32(params[name]) for name in chunk]
            anchors = [_at_least_fp32(anchor[name]) for name in chunk]
            differences = torch._foreach_sub(weights, anchors)
        yield list(zip([params[name] for name in chunk], differences, strict=True))


def _chunks(params: Mapping[str, Tensor]) -> Iterator[list[str]]:
    chunk: list[str] = []
    elements = 0
    for name, param in params.items():
        if chunk and elements + param.numel() > _CHUNK_ELEMENTS:
            yield chunk
            chunk, elements = [], 0
        chunk.append(name)
        elements += param.numel()
    if chunk:
        yield chunk


def _at_least_fp32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor
