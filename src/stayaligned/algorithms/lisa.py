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
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from stayaligned.core.errors import StayalignedError

Anchor = Mapping[str, Tensor]
"""The trainable weights, by name, as they were when the current state began; of a sharded weight, the local shard."""
RhoSchedule = Literal["constant", "rising", "falling"]
Device = Literal["model", "cpu"]
"""Where copies of the weights are kept: beside the weights, or in the host's memory."""

_CHUNK_ELEMENTS = 1 << 26
"""Weights whose difference is held at once: 256 MiB in fp32, however large the model."""
_CHUNK_ELEMENTS_CPU = 1 << 18
"""The same on a CPU, where a difference that stays in the cache is four times as fast."""


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
        ends_aligned_at: the steps of a whole run, of which the last K1 are alignment steps whatever the cycle says.
            Without it the run ends where its last cycle is, as in the paper: after a fine-tuning state.

    Raises:
        StayalignedError: if one is negative or both are 0.
    """

    alignment_steps: int
    finetuning_steps: int
    ends_aligned_at: int | None = None

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

    def _in_cycles(self, step: int) -> int:
        """How many of the first `step` steps are before the alignment steps that end the run."""
        return step if self.ends_aligned_at is None else min(step, max(0, self.ends_aligned_at - self.alignment_steps))

    def phase_at(self, step: int) -> Phase:
        """The state of optimizer step `step` (counted from 0)."""
        aligned = step % self.cycle_steps < self.alignment_steps or self._in_cycles(step + 1) <= step
        return Phase.ALIGNMENT if aligned else Phase.FINETUNING

    def switches_at(self, step: int) -> bool:
        """Whether `step` is the first of a state that follows another; never, where one of them has no steps."""
        return step > 0 and self.phase_at(step) != self.phase_at(step - 1)

    def steps_before(self, step: int, phase: Phase) -> int:
        """How many of the steps 0 … `step - 1` are in `phase`."""
        in_cycles = self._in_cycles(step)
        cycles, rest = divmod(in_cycles, self.cycle_steps)
        alignment = cycles * self.alignment_steps + min(rest, self.alignment_steps) + step - in_cycles
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


def rho_at(step: int, total_steps: int, *, rho: float, from_step: int, schedule: RhoSchedule) -> float:
    """ρ of one optimizer step: 0 before `from_step`, then constant, or linear between 0 and ρ over the steps left.

    The paper's ρ is constant. `rising` ends at ρ, `falling` starts there.

    Example:
        >>> [rho_at(step, 6, rho=1.0, from_step=2, schedule="rising") for step in range(6)]
        [0.0, 0.0, 0.25, 0.5, 0.75, 1.0]
    """
    if step < from_step:
        return 0.0
    if schedule == "constant":
        return rho
    steps = max(total_steps - from_step, 1)
    share = (step - from_step + 1) / steps if schedule == "rising" else 1 - (step - from_step) / steps
    return rho * share


@dataclass(frozen=True, slots=True)
class LossBudget:
    """How far the alignment loss may rise before the pull is strengthened.

    Once a cycle, ρ is doubled where the alignment loss of the state that ended is more than `rise` above that of the
    first, and halved where it is not; never below the ρ that was asked for, nor above `ceiling` times it. The rule is
    that of the adaptive KL penalty of PPO (Schulman et al. 2017, §4), with the alignment loss in the place of the
    divergence. Not from the Lisa paper.

    Example:
        >>> budget = LossBudget(rise=0.1, ceiling=8.0)
        >>> budget.next_factor(1.0, loss=0.5, first_loss=0.2), budget.next_factor(4.0, loss=0.25, first_loss=0.2)
        (2.0, 2.0)
    """

    rise: float
    """Nats a token."""
    ceiling: float

    def next_factor(self, factor: float, *, loss: float, first_loss: float) -> float:
        """What ρ is multiplied by in the next cycle, after `factor` in this one."""
        return min(2 * factor, self.ceiling) if loss > first_loss + self.rise else max(factor / 2, 1.0)


def take_anchor(params: Mapping[str, Tensor], *, device: Device = "model", into: Anchor | None = None) -> Anchor:
    """A copy of the weights, to be pulled back to.

    Args:
        params: the trainable weights by name; of a DTensor, this process's shard is copied.
        device: "cpu" keeps the copy in the host's memory (page-locked, where the weights are on a GPU), so that it
            costs none of the accelerator's.
        into: an earlier copy of the same weights, whose memory is used again.
    """
    anchor = into if into is not None and into.keys() == params.keys() else empty_anchor(params, device=device)
    with torch.no_grad():
        for name, param in params.items():
            anchor[name].copy_(local(param))
    return anchor


def empty_anchor(params: Mapping[str, Tensor], *, device: Device = "model") -> Anchor:
    """Memory for `take_anchor`, uninitialized."""

    def room(weight: Tensor) -> Tensor:
        if device == "model" or weight.device.type == "cpu":
            return torch.empty_like(weight, requires_grad=False)
        return torch.empty(weight.shape, dtype=weight.dtype, device="cpu", pin_memory=weight.device.type == "cuda")

    return {name: room(local(param).detach()) for name, param in params.items()}


def add_proximal_gradient_(params: Mapping[str, Tensor], anchor: Anchor, rho: float, *, scale: float = 1.0) -> None:
    """Add the gradient of the proximal term to `param.grad`, in place.

    ∇ ρ/2·‖w − w_anchor‖² = ρ·(w − w_anchor)   (Lisa, Algorithm 2 and equation 2)

    The published code adds the term to the loss of every micro-batch. As a gradient it is added once per optimizer
    step, after the gradients are summed and before they are clipped, which is the same arithmetic and needs no
    second graph. The difference is taken in fp32 at least. A weight that the loss did not reach gets a gradient too.
    Of a sharded weight (DTensor) each process adds to its own shard of the gradient, and nothing is communicated.

    Args:
        params: the trainable weights by name.
        anchor: the same names, shapes and types.
        rho: ρ, the strength of the pull.
        scale: what the loss was multiplied by before its backward pass (a gradient scaler's factor).

    Raises:
        StayalignedError: if the names differ.
    """
    for names, differences in _differences(params, anchor):
        for name in names:
            if params[name].grad is None:
                params[name].grad = torch.zeros_like(params[name])
        torch._foreach_add_([local(params[name].grad) for name in names], differences, alpha=rho * scale)  # pyright: ignore[reportArgumentType]


def proximal_step_(
    params: Mapping[str, Tensor], anchor: Anchor, rho: float, learning_rates: Mapping[str, float]
) -> None:
    """Move the weights towards the anchor, in place: the pull decoupled from the optimizer's gradient.

    w ← w − η·ρ·(w − w_anchor)

    As AdamW decouples weight decay (Loshchilov & Hutter 2019), of which this is the form with the anchor in the place
    of 0: taken after the optimizer's step, it is not divided by Adam's second moment. Not from the Lisa paper.

    Args:
        params: the trainable weights by name.
        anchor: the same names, shapes and types.
        rho: ρ.
        learning_rates: η by name.

    Raises:
        StayalignedError: if the names differ, or some η·ρ exceeds 1, which would overshoot the anchor.
    """
    largest = rho * max(learning_rates.values(), default=0.0)
    if largest > 1:
        raise StayalignedError(
            f"rho={rho:g} at a learning rate of {max(learning_rates.values()):g} moves the weights by {largest:.3g} "
            "times their distance to the anchor, past it",
            hint="With proximal='decoupled', take rho below 1 / learning_rate.",
        )
    for names, differences in _differences(params, anchor):
        torch._foreach_mul_(differences, [rho * learning_rates[name] for name in names])
        with torch.no_grad():
            torch._foreach_sub_([local(params[name]) for name in names], differences)


def drift(params: Mapping[str, Tensor], anchor: Anchor) -> Tensor:
    """‖w − w_anchor‖, the Euclidean norm over all weights; a scalar, the same in every process.

    The published code prints its square, and the paper plots it.

    Raises:
        StayalignedError: if the names differ.
    """
    squares: dict[tuple[dist.ProcessGroup, ...], list[Tensor]] = {}
    for names, differences in _differences(params, anchor):
        for name, norm in zip(names, torch._foreach_norm(differences), strict=True):
            squares.setdefault(_shard_groups(params[name]), []).append(norm.double() ** 2)
    totals: list[Tensor] = []
    for groups, parts in squares.items():
        total = torch.stack(parts).sum()
        for group in groups:
            dist.all_reduce(total, group=group)
        totals.append(total)
    return torch.stack(totals).sum().sqrt()


def local(tensor: Tensor) -> Tensor:
    """This process's shard of a sharded tensor, sharing its memory; any other tensor itself."""
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


def _shard_groups(tensor: Tensor) -> tuple[dist.ProcessGroup, ...]:
    """The groups of processes over which a tensor is split; where it is merely repeated, none."""
    if not isinstance(tensor, DTensor):
        return ()
    mesh = tensor.device_mesh
    return tuple(mesh.get_group(axis) for axis, placed in enumerate(tensor.placements) if placed.is_shard())


def _differences(params: Mapping[str, Tensor], anchor: Anchor) -> Iterator[tuple[list[str], list[Tensor]]]:
    """(names, weights − anchors) in chunks, of local shards, in fp32 where the weights are stored in less."""
    if params.keys() != anchor.keys():
        missing, extra = sorted(params.keys() - anchor.keys()), sorted(anchor.keys() - params.keys())
        raise StayalignedError(
            f"the trainable weights are not those of the anchor: without an anchor {missing}, not trained {extra}",
            hint="Freeze and unfreeze weights before training starts.",
        )
    for chunk in _chunks(params):
        with torch.no_grad():
            weights = [local(params[name]) for name in chunk]
            anchors = [
                _at_least_fp32(anchor[name].to(weight.device, non_blocking=True))
                for name, weight in zip(chunk, weights, strict=True)
            ]
            differences = torch._foreach_sub([_at_least_fp32(weight) for weight in weights], anchors)
        yield chunk, list(differences)


def _chunks(params: Mapping[str, Tensor]) -> Iterator[list[str]]:
    chunk: list[str] = []
    elements = 0
    for name, param in params.items():
        size = local(param).numel()
        most = _CHUNK_ELEMENTS_CPU if param.device.type == "cpu" else _CHUNK_ELEMENTS
        if chunk and elements + size > most:
            yield chunk
            chunk, elements = [], 0
        chunk.append(name)
        elements += size
    if chunk:
        yield chunk


def _at_least_fp32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor
