"""Differences of two checkpoints' weights, streamed.

A weight's rows are read with `pread` in blocks that fit the cache and subtracted there, so comparing two 140 GB
checkpoints needs the memory of a few weights, and the resident size that the system reports is the memory that is used
(a memory-mapped file would count whatever was touched).
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from stayaligned.core.errors import StayalignedError
from stayaligned.weights.checkpoints import REDOWNLOAD, Checkpoint, Span, Weight, whole

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK_ELEMENTS = 1 << 18
"""Elements of a row block: 1 MiB in fp32, so that reading, subtracting and summing it happen in the cache."""
_BYTES_IN_FLIGHT = 400 << 20
"""How much of V (fp32) the workers may hold at once; a single larger weight is worked on alone."""

T = TypeVar("T")


class Difference(NamedTuple):
    """What is subtracted from what."""

    checkpoint: Checkpoint
    weight: Weight
    minus: Checkpoint | None
    """None: the weight itself, nothing subtracted."""
    minus_weight: Weight

    def spans(self) -> list[Span]:
        """All rows that it takes, of both sides."""
        other = self.minus.spans(self.minus_weight) if self.minus is not None else []
        return [*self.checkpoint.spans(self.weight), *other]


class Delta(NamedTuple):
    """One difference of weights, in fp32 whatever the checkpoints store."""

    name: str
    value: Tensor
    """(rows, columns) as stored. A buffer that is used again: valid until the work on it returns."""
    norm: float
    """Its Frobenius norm, accumulated in fp64."""


def paired(
    aligned: Checkpoint, base: Checkpoint, weights: Mapping[str, tuple[Weight, Weight]] | Sequence[str]
) -> dict[str, tuple[Difference]]:
    """V = W_aligned - W_base for each label, ready to be streamed.

    Args:
        aligned: the aligned checkpoint.
        base: its unaligned ancestor; shards, storage type and names may differ.
        weights: {label: (where aligned stores it, where base does)}, or names that both use.

    Raises:
        StayalignedError: if a weight is missing or shaped differently (all of them are listed), or both are one
            directory.
    """
    if aligned.directory.resolve() == base.directory.resolve():
        raise StayalignedError(
            f"aligned and base are the same directory, {aligned.directory}", hint="Name two different checkpoints."
        )
    pairs = weights if isinstance(weights, Mapping) else {name: (whole(name), whole(name)) for name in weights}
    hint = "The base must be the ancestor that the aligned model was trained from."
    check_pairs(aligned, base, pairs, role="base", hint=hint)
    return {label: (Difference(aligned, first, base, second),) for label, (first, second) in pairs.items()}


def check_pairs(
    aligned: Checkpoint, other: Checkpoint, pairs: Mapping[str, tuple[Weight, Weight]], *, role: str, hint: str
) -> None:
    """Raise unless both checkpoints hold every weight, in equal shapes.

    Args:
        aligned: the aligned model.
        other: what it is compared with.
        pairs: {label: (where aligned stores it, where the other does)}.
        role: what the other is, for the message.
        hint: what to do.

    Raises:
        StayalignedError: listing all that are missing and all that are shaped differently.
    """
    missing = [
        f"{label} (not in {checkpoint.directory})"
        for label, weights in pairs.items()
        for checkpoint, weight in zip((aligned, other), weights, strict=True)
        if any(block.name not in checkpoint for block in weight)
    ]
    differing: list[str] = []
    for label, (first, second) in pairs.items():
        if all(b.name in aligned for b in first) and all(b.name in other for b in second):
            shapes = aligned.matrix_shape(first), other.matrix_shape(second)
            if shapes[0] != shapes[1]:
                differing.append(f"{label} ({'×'.join(map(str, shapes[0]))} against {'×'.join(map(str, shapes[1]))})")
    if missing or differing:
        raise StayalignedError(
            f"aligned {aligned.directory} and {role} {other.directory} don't match. "
            f"Missing: {', '.join(missing) or 'none'}. Different shape: {', '.join(differing) or 'none'}",
            hint=hint,
        )


class BytesDone(NamedTuple):
    """How far a stream is, in bytes of the checkpoints."""

    done: int
    total: int


def stream(
    items: Mapping[str, Sequence[Difference]],
    work: Callable[[str, list[Delta]], T],
    *,
    device: str = "cpu",
    progress: Callable[[BytesDone], None] | None = None,
) -> Iterator[tuple[str, T]]:
    """Call `work(label, differences)` for each label and yield (label, its result) in order.

    The work runs in as many threads as torch may use, each with one thread of torch and buffers of its own, so that
    one reads while another computes; the system is asked to read ahead. Memory: the buffers of at most
    `torch.get_num_threads()` items (of one, where items are large), and results that wait for their turn.

    Args:
        items: what to subtract, per label.
        work: gets the differences in the order of the item; their values are only valid during the call.
        device: where the differences are made ("cuda" for a GPU).
        progress: called after each item.

    Raises:
        StayalignedError: if a shard is damaged, a value is not finite, or the storage type is no plain float.
    """
    import torch

    sizes = {label: _item_bytes(differences) for label, differences in items.items()}
    largest = max((fp32 for _, fp32 in sizes.values()), default=0)
    threads = torch.get_num_threads()
    workers = max(1, min(threads, len(items), _BYTES_IN_FLIGHT // max(1, largest)))
    total, done = sum(stored for stored, _ in sizes.values()), 0
    local = threading.local()

    def run(label: str) -> T:
        if not hasattr(local, "buffers"):
            torch.set_num_threads(max(1, threads // workers))
            local.buffers = _Buffers(device)
        return work(label, [local.buffers.subtract(i, label, d) for i, d in enumerate(items[label])])

    waiting = iter(items)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="stream")
    try:
        first = itertools.islice(waiting, workers + 1)
        running: list[tuple[str, Future[T]]] = [(label, pool.submit(run, label)) for label in first]
        while running:
            label, future = running.pop(0)
            result = future.result()
            for following in itertools.islice(waiting, 1):
                running.append((following, pool.submit(run, following)))
                _read_ahead(items[following])
            done += sizes[label][0]
            if progress is not None:
                progress(BytesDone(done, total))
            yield label, result
            del result
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def require_device(device: str) -> None:
    """Raise unless torch can work on the device.

    Raises:
        StayalignedError: then.
    """
    import torch

    try:
        if torch.device(device).type not in ("cpu", "cuda"):
            raise RuntimeError("neither a CPU nor a GPU of CUDA")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise StayalignedError(f"device {device!r}: {reason}", hint="Use cpu, or cuda where there is a GPU.") from None


def refuse_equal(aligned: Checkpoint, base: Checkpoint) -> StayalignedError:
    """The error for two checkpoints whose compared weights are all equal."""
    return StayalignedError(
        f"{aligned.directory} and {base.directory} hold the same weights: there is no alignment direction",
        hint="`aligned` is the chat or instruct model, `base` its pretrained ancestor.",
    )


class _Buffers:
    """What one worker reads into and subtracts in, used again for every weight."""

    def __init__(self, device: str) -> None:
        import torch

        self._device = torch.device(device)
        self._raw = torch.empty(0, dtype=torch.uint8)
        self._fp64 = torch.empty(0, dtype=torch.float64, device=self._device)
        self._values: list[Tensor] = []

    def subtract(self, slot: int, label: str, difference: Difference) -> Delta:
        """One difference, in the slot's buffer."""
        import torch

        rows, columns = difference.checkpoint.matrix_shape(difference.weight)
        value = self._value(slot, rows * columns).view(rows, columns)
        minuend = difference.checkpoint.spans(difference.weight)
        subtrahend = difference.minus.spans(difference.minus_weight) if difference.minus is not None else None
        squares: list[Tensor] = []
        step = max(1, _BLOCK_ELEMENTS // max(1, columns))
        for start in range(0, rows, step):
            block = value[start : start + step]
            block.copy_(self._rows(minuend, start, len(block)))
            if subtrahend is not None:
                block.sub_(self._rows(subtrahend, start, len(block)))  # bf16 and fp16 are promoted one by one
            exact = self._exact(block.numel())
            exact.copy_(block.view(-1))
            squares.append(torch.dot(exact, exact))
        square = float(torch.stack(squares).sum()) if squares else 0.0
        if not math.isfinite(square):
            places = [str(c.directory) for c in (difference.checkpoint, difference.minus) if c is not None]
            raise StayalignedError(f"{label} is not finite in {' or '.join(places)}", hint=REDOWNLOAD)
        return Delta(label, value, math.sqrt(square))

    def _exact(self, elements: int) -> Tensor:
        """Room for a block in fp64: a fresh one for each block would cost more than the sum, to map its pages."""
        if self._fp64.numel() < elements:
            self._fp64 = self._fp64.new_empty(elements)
        return self._fp64[:elements]

    def _value(self, slot: int, elements: int) -> Tensor:
        import torch

        while len(self._values) <= slot:
            self._values.append(torch.empty(0, device=self._device))
        if self._values[slot].numel() < elements:
            self._values[slot] = torch.empty(0, device=self._device)  # freed before the larger one is made
            self._values[slot] = torch.empty(elements, device=self._device)
        return self._values[slot][:elements]

    def _rows(self, spans: Sequence[Span], start: int, count: int) -> Tensor:
        """`count` rows from `start` on, in the stored type, on the device; valid until the next call."""
        import torch

        dtype, columns = spans[0].dtype, spans[0].columns
        width = columns * dtype.itemsize
        if self._raw.numel() < count * width:
            self._raw = torch.empty(count * width, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        raw = self._raw[: count * width]
        buffer, first = memoryview(raw.numpy().data), 0
        for span in spans:
            low, high = max(start, first), min(start + count, first + span.rows)
            if low < high:
                place = buffer[(low - start) * width : (high - start) * width]
                span.file.read_into(place, span.offset + (low - first) * width)
            first += span.rows
        return raw.view(dtype).view(count, columns).to(self._device)


def _item_bytes(differences: Sequence[Difference]) -> tuple[int, int]:
    """Bytes that an item has in the files, and in fp32."""
    shapes = [difference.checkpoint.matrix_shape(difference.weight) for difference in differences]
    stored = sum(span.size for difference in differences for span in difference.spans())
    return stored, sum(rows * columns * 4 for rows, columns in shapes)


def _read_ahead(differences: Sequence[Difference]) -> None:
    for difference in differences:
        for span in difference.spans():
            span.file.will_need(span.offset, span.size)
