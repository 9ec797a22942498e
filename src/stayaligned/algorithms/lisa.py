"""Lisa's operations on rows and weights (arXiv 2405.18641): which rows a step takes, and the proximal term.

Everything here is a pure function of the optimizer step and a seed, so that a resumed run, a run on more processes
and a run with another number of accumulated micro-batches do the same. Settings and schedule are in
`lisa_schedule.py`.
"""

# torch's multi-tensor operations are documented by name only under an underscore.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from stayaligned.algorithms.lisa_schedule import AnchorDevice, BiStateSchedule, Phase
from stayaligned.core.errors import StayalignedError

Anchor = Mapping[str, Tensor]
"""Copies by name of the trainable weights at the start of the current phase; of a sharded weight, the local shard."""

_CHUNK_ELEMENTS = 1 << 26
"""Number of weights whose differences are in memory at once: 256 MiB in fp32, whatever the size of the model."""
_CHUNK_ELEMENTS_CPU = 1 << 18
"""The same limit on a CPU, where differences that stay in the cache are four times as fast."""


# ---- rows ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RowStream:
    """An endless shuffled stream of `size` row indices: one new permutation per pass, without a gap between passes."""

    size: int
    seed: int
    name: str
    """Name that distinguishes several streams of one seed."""

    def take(self, start: int, count: int) -> list[int]:
        """Return the rows at positions `start` … `start + count - 1` of the stream."""
        return [self._permutation(at // self.size)[at % self.size] for at in range(start, start + count)]

    def _permutation(self, epoch: int) -> list[int]:
        return _permutation(self.size, f"{self.name}/{self.seed}/{epoch}")


@lru_cache(maxsize=4)  # two streams, each at most between two passes
def _permutation(size: int, key: str) -> list[int]:
    # A hash, because neighboring integer seeds of two streams would repeat each other's permutations.
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big")
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed)).tolist()


def row_indices_at(
    step: int, schedule: BiStateSchedule, *, rows_per_step: int, finetuning: RowStream, alignment: RowStream
) -> list[int]:
    """Return the rows of optimizer step `step`, all from the stream of its phase.

    Each stream continues where the last step of its phase ended.

    Returns:
        `rows_per_step` indices into the user's rows followed by the alignment rows.
    """
    phase = schedule.phase_at(step)
    start = schedule.steps_before(step, phase) * rows_per_step
    if phase is Phase.FINETUNING:
        return finetuning.take(start, rows_per_step)
    return [finetuning.size + index for index in alignment.take(start, rows_per_step)]


# ---- the anchor and the proximal term ------------------------------------------------------------------------------


def take_anchor(params: Mapping[str, Tensor], *, device: AnchorDevice = "model", into: Anchor | None = None) -> Anchor:
    """Copy the weights as the anchor of the proximal term.

    Args:
        params: the trainable weights by name; of a DTensor, this process's shard is copied.
        device: "cpu" stores the copy in main memory (page-locked if the weights are on a GPU), so that it needs no
            memory of the accelerator.
        into: an earlier copy of the same weights, whose memory is reused.
    """
    anchor = into if into is not None and into.keys() == params.keys() else empty_anchor(params, device=device)
    with torch.no_grad():
        for name, param in params.items():
            anchor[name].copy_(local_shard(param))
    return anchor


def empty_anchor(params: Mapping[str, Tensor], *, device: AnchorDevice = "model") -> Anchor:
    """Allocate uninitialized memory for `take_anchor`."""

    def allocate(weight: Tensor) -> Tensor:
        if device == "model" or weight.device.type == "cpu":
            return torch.empty_like(weight, requires_grad=False)
        return torch.empty(weight.shape, dtype=weight.dtype, device="cpu", pin_memory=weight.device.type == "cuda")

    return {name: allocate(local_shard(param).detach()) for name, param in params.items()}


def add_proximal_gradient_(params: Mapping[str, Tensor], anchor: Anchor, rho: float, *, scale: float = 1.0) -> None:
    """Add the gradient of the proximal term to `param.grad`, in place.

    ∇ ρ/2·‖w − w_anchor‖² = ρ·(w − w_anchor)   (Lisa, Algorithm 2 and equation 2)

    The published code adds the term to the loss of every micro-batch. As a gradient it is added once per optimizer
    step, after the gradients are summed and before they are clipped, which is the same arithmetic and needs no
    second graph. The difference is taken in at least fp32. A weight without a gradient gets one. Of a sharded weight
    (DTensor) each process updates its own shard of the gradient, without communication.

    Args:
        params: the trainable weights by name.
        anchor: the same names, shapes and types.
        rho: ρ, the strength of the proximal term.
        scale: the factor by which the loss was multiplied before its backward pass (of a gradient scaler).

    Raises:
        StayalignedError: if the names differ.
    """
    for names, differences in _iter_differences(params, anchor):
        for name in names:
            if params[name].grad is None:
                params[name].grad = torch.zeros_like(params[name])
        torch._foreach_add_([local_shard(params[name].grad) for name in names], differences, alpha=rho * scale)  # pyright: ignore[reportArgumentType]


def proximal_step_(
    params: Mapping[str, Tensor], anchor: Anchor, rho: float, learning_rates: Mapping[str, float]
) -> None:
    """Move the weights towards the anchor, in place: the proximal term decoupled from the optimizer's gradient.

    w ← w − η·ρ·(w − w_anchor)

    This is how AdamW decouples weight decay (Loshchilov & Hutter 2019), with the anchor instead of 0: taken after the
    optimizer's step, it is not divided by Adam's second moment. Not from the Lisa paper.

    Args:
        params: the trainable weights by name.
        anchor: the same names, shapes and types.
        rho: ρ.
        learning_rates: η by name.

    Raises:
        StayalignedError: if the names differ, or a product η·ρ exceeds 1, which would overshoot the anchor.
    """
    largest = rho * max(learning_rates.values(), default=0.0)
    if largest > 1:
        raise StayalignedError(
            f"rho={rho:g} at a learning rate of {max(learning_rates.values()):g} moves the weights by {largest:.3g} "
            "times their distance to the anchor, past it",
            hint="With proximal='decoupled', set rho below 1 / learning_rate.",
        )
    for names, differences in _iter_differences(params, anchor):
        torch._foreach_mul_(differences, [rho * learning_rates[name] for name in names])
        with torch.no_grad():
            torch._foreach_sub_([local_shard(params[name]) for name in names], differences)


def drift(params: Mapping[str, Tensor], anchor: Anchor) -> Tensor:
    """Return ‖w − w_anchor‖, the Euclidean norm over all weights: a scalar, the same in every process.

    The published code prints the square, and the paper plots it.

    Raises:
        StayalignedError: if the names differ.
    """
    squares: dict[tuple[dist.ProcessGroup, ...], list[Tensor]] = {}
    for names, differences in _iter_differences(params, anchor):
        for name, norm in zip(names, torch._foreach_norm(differences), strict=True):
            squares.setdefault(_shard_groups(params[name]), []).append(norm.double() ** 2)
    totals: list[Tensor] = []
    for groups, parts in squares.items():
        total = torch.stack(parts).sum()
        for group in groups:
            dist.all_reduce(total, group=group)
        totals.append(total)
    return torch.stack(totals).sum().sqrt()


def local_shard(tensor: Tensor) -> Tensor:
    """Return this process's shard of a DTensor, sharing its memory; any other tensor is returned unchanged."""
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


def _shard_groups(tensor: Tensor) -> tuple[dist.ProcessGroup, ...]:
    """Return the process groups over which a tensor is split; none where it is replicated."""
    if not isinstance(tensor, DTensor):
        return ()
    mesh = tensor.device_mesh
    return tuple(mesh.get_group(axis) for axis, placed in enumerate(tensor.placements) if placed.is_shard())


def _iter_differences(params: Mapping[str, Tensor], anchor: Anchor) -> Iterator[tuple[list[str], list[Tensor]]]:
    """Yield (names, weights − anchors) in chunks of local shards, in at least fp32."""
    if params.keys() != anchor.keys():
        missing, extra = sorted(params.keys() - anchor.keys()), sorted(anchor.keys() - params.keys())
        raise StayalignedError(
            f"the trainable weights differ from those of the anchor: without an anchor {missing}, not trained {extra}",
            hint="Freeze and unfreeze weights before training starts.",
        )
    for chunk in _iter_chunks(params):
        with torch.no_grad():
            weights = [local_shard(params[name]) for name in chunk]
            anchors = [
                _upcast(anchor[name].to(weight.device, non_blocking=True))
                for name, weight in zip(chunk, weights, strict=True)
            ]
            differences = torch._foreach_sub([_upcast(weight) for weight in weights], anchors)
        yield chunk, list(differences)


def _iter_chunks(params: Mapping[str, Tensor]) -> Iterator[list[str]]:
    chunk: list[str] = []
    elements = 0
    for name, param in params.items():
        size = local_shard(param).numel()
        limit = _CHUNK_ELEMENTS_CPU if param.device.type == "cpu" else _CHUNK_ELEMENTS
        if chunk and elements + size > limit:
            yield chunk
            chunk, elements = [], 0
        chunk.append(name)
        elements += size
    if chunk:
        yield chunk


def _upcast(tensor: Tensor) -> Tensor:
    """Convert half precision to fp32."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor
