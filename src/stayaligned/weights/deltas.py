"""Stream the differences of two checkpoints' weights.

A weight's rows are read with `pread` in blocks that fit the CPU cache and subtracted there, so comparing two 140 GB
checkpoints needs the memory of a few weights. The resident size that the system reports is the memory that is needed
(with memory-mapped files it would include every page that was read).
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from stayaligned.core.errors import StayalignedError
from stayaligned.weights.checkpoints import Checkpoint, Span, Weight

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK_ELEMENTS = 1 << 18
"""Elements of a row block: 1 MiB in fp32, so that it stays in the cache while it is read, subtracted and summed."""
_SAMPLED_BLOCKS = 8
"""One of this many row blocks is compared with the other weight's."""
_FP32_ROUNDING = 2.0**-23
"""Norm of a difference, as a share of the weight's, up to which it is rounding in fp32 (as after `unmerge`)."""
_BYTES_IN_FLIGHT = 400 << 20
"""Bytes of V (fp32) that the workers hold at once at most; a larger weight is processed alone."""

T = TypeVar("T")


class WeightDifference(NamedTuple):
    """A weight of one checkpoint minus a weight of another."""

    checkpoint: Checkpoint
    weight: Weight
    minus: Checkpoint | None
    """Checkpoint of the weight to subtract; None to subtract nothing."""
    minus_weight: Weight

    def spans(self) -> list[Span]:
        """Return the places of all rows, of both weights."""
        other = self.minus.spans(self.minus_weight) if self.minus is not None else []
        return [*self.checkpoint.spans(self.weight), *other]


class WeightOverlap(NamedTuple):
    """Inner products of two weights over a sample of their rows; of several weights, the sums."""

    first: float
    """Squared norm of the first weight."""
    second: float
    """Squared norm of the second weight."""
    inner: float
    """Frobenius inner product of both."""

    @property
    def cosine(self) -> float:
        """Cosine of both weights: near 1 for a model and its fine-tune, near 0 for two models without an ancestor."""
        product = math.sqrt(self.first * self.second)
        return self.inner / product if product else 0.0

    @classmethod
    def total(cls, parts: Iterable[WeightOverlap]) -> WeightOverlap:
        """Return the overlap of several pairs of weights together."""
        columns = zip(*parts, strict=True)
        return cls(*map(math.fsum, columns))


class Delta(NamedTuple):
    """The value of a `WeightDifference`, in fp32 for every storage type."""

    value: Tensor
    """Difference (rows, columns), oriented as stored. The buffer is reused after the work on it returns."""
    norm: float
    """Frobenius norm of the difference, accumulated in fp64."""
    overlap: WeightOverlap | None = None
    """How alike both weights are; None if nothing was subtracted."""
    rounding: bool = False
    """Whether the difference is not zero, but only rounding: to bf16 or fp16, or of sums in fp32."""


def pair_weights(
    aligned: Checkpoint, base: Checkpoint, pairs: Mapping[str, tuple[Weight, Weight]]
) -> dict[str, tuple[WeightDifference]]:
    """Return V = W_aligned - W_base for each label, ready to be streamed.

    Args:
        aligned: the aligned checkpoint.
        base: its unaligned ancestor; shards, storage type and names may differ.
        pairs: {label: (weight in aligned, weight in base)}.

    Raises:
        StayalignedError: if weights are missing or differ in shape (all are listed), or both are the same directory.
    """
    if aligned.directory.resolve() == base.directory.resolve():
        raise StayalignedError(
            f"aligned and base are the same directory, {aligned.directory}", hint="Give two different checkpoints."
        )
    hint = "Give the base that the aligned model was trained from."
    check_pairs(aligned, base, pairs, role="base", hint=hint)
    return {label: (WeightDifference(aligned, first, base, second),) for label, (first, second) in pairs.items()}


def check_pairs(
    aligned: Checkpoint, other: Checkpoint, pairs: Mapping[str, tuple[Weight, Weight]], *, role: str, hint: str
) -> None:
    """Raise unless both checkpoints hold every weight, in equal shapes.

    Args:
        aligned: the aligned model.
        other: the checkpoint to compare with.
        pairs: {label: (weight in aligned, weight in the other)}.
        role: the other's role, for the message.
        hint: the error's hint.

    Raises:
        StayalignedError: listing all weights that are missing or differ in shape.
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
    """Progress of a stream, in bytes of the checkpoints."""

    done: int
    total: int


def stream(
    items: Mapping[str, Sequence[WeightDifference]],
    work: Callable[[str, list[Delta]], T],
    *,
    device: str = "cpu",
    progress: Callable[[BytesDone], None] | None = None,
) -> Iterator[tuple[str, T]]:
    """Call `work(label, differences)` for each label and yield (label, result) in order.

    The work runs in as many threads as torch may use, each with one torch thread and its own buffers, so that one
    thread reads while another computes; the system is asked to read ahead. Memory: the buffers of at most
    `torch.get_num_threads()` items (of one item if items are large), and the results that wait for earlier ones.

    Args:
        items: {label: the differences to compute}.
        work: called with the differences in the item's order; their values are valid only during the call.
        device: where differences are computed ("cuda" for a GPU).
        progress: called after each item.

    Raises:
        StayalignedError: if a shard is damaged, a value is not finite, or the storage type is not a plain float.
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
    """Raise unless torch can compute on the device.

    Raises:
        StayalignedError: if it can't.
    """
    import torch

    try:
        if torch.device(device).type not in ("cpu", "cuda"):
            raise RuntimeError("expected cpu or cuda")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise StayalignedError(
            f"device {device!r}: {reason}", hint="Use cpu, or cuda on a machine with a GPU."
        ) from None


def equal_weights_error(aligned: Checkpoint, base: Checkpoint) -> StayalignedError:
    """Return the error for two checkpoints whose weights are all equal."""
    return StayalignedError(
        f"{aligned.directory} and {base.directory} hold the same weights (at most rounded to another type): there is "
        "no alignment direction",
        hint="Give the chat or instruct model as `aligned`, and its pretrained ancestor as `base`.",
    )


def equal_layers_error(aligned: Checkpoint, base: Checkpoint, layers: int) -> StayalignedError:
    """Return the error for two checkpoints whose weights are equal in all layers of interest."""
    return StayalignedError(
        f"{aligned.directory} and {base.directory} hold the same weights in all {layers} layers to patch (at most "
        "rounded to another type): there is no alignment direction",
        hint="Give the chat or instruct model as `aligned`, and its pretrained ancestor as `base`. If the alignment "
        "changed other modules only, the method does not apply.",
    )


class _Buffers:
    """Buffers of one worker, reused for every weight."""

    def __init__(self, device: str) -> None:
        import torch

        self._device = torch.device(device)
        self._raw = torch.empty(0, dtype=torch.uint8)
        self._fp64 = torch.empty(0, dtype=torch.float64, device=self._device)
        self._values: list[Tensor] = []

    def subtract(self, slot: int, label: str, difference: WeightDifference) -> Delta:
        """Compute one difference in the slot's buffer."""
        import torch

        rows, columns = difference.checkpoint.matrix_shape(difference.weight)
        value = self._value(slot, rows * columns).view(rows, columns)
        minuend = difference.checkpoint.spans(difference.weight)
        subtrahend = difference.minus.spans(difference.minus_weight) if difference.minus is not None else None
        squares: list[Tensor] = []
        sampled: list[Tensor] = []  # (‖first‖², ‖second‖², ‖first - second‖²) of every eighth block
        rounding = subtrahend is not None
        step = max(1, _BLOCK_ELEMENTS // max(1, columns))
        for start in range(0, rows, step):
            block = value[start : start + step]
            block.copy_(self._rows(minuend, start, len(block)))
            norms: list[Tensor] = []
            if subtrahend is not None:
                rows_of_second = self._rows(subtrahend, start, len(block))
                if start // step % _SAMPLED_BLOCKS == 0:
                    norms = [_square(block), _square(rows_of_second.to(block.dtype))]
                rounding = rounding and _is_rounding(block, rows_of_second.to(block.dtype))
                block.sub_(rows_of_second)  # promotes bf16 and fp16 to fp32 element by element
            exact = self._exact(block.numel())
            exact.copy_(block.view(-1))
            squares.append(torch.dot(exact, exact))
            if norms:
                sampled.append(torch.stack([*norms, squares[-1]]))
        square = float(torch.stack(squares).sum()) if squares else 0.0
        if not math.isfinite(square):
            directories = [str(c.directory) for c in (difference.checkpoint, difference.minus) if c is not None]
            raise StayalignedError(
                f"{label} holds NaN or infinity in {' or '.join(directories)}",
                hint="Train or download the model again: training diverged, or the file is damaged.",
            )
        if not sampled:
            return Delta(value, math.sqrt(square))
        first, second, apart = torch.stack(sampled).sum(dim=0).tolist()
        overlap = WeightOverlap(first, second, (first + second - apart) / 2)
        rounding = rounding or apart <= _FP32_ROUNDING**2 * first
        return Delta(value, math.sqrt(square), overlap, rounding and square > 0)

    def _exact(self, elements: int) -> Tensor:
        """Return a buffer for a block in fp64; allocating one for each block would cost more than the sum itself."""
        if self._fp64.numel() < elements:
            self._fp64 = self._fp64.new_empty(elements)
        return self._fp64[:elements]

    def _value(self, slot: int, elements: int) -> Tensor:
        import torch

        while len(self._values) <= slot:
            self._values.append(torch.empty(0, device=self._device))
        if self._values[slot].numel() < elements:
            self._values[slot] = torch.empty(0, device=self._device)  # free the old buffer before allocating
            self._values[slot] = torch.empty(elements, device=self._device)
        return self._values[slot][:elements]

    def _rows(self, spans: Sequence[Span], start: int, count: int) -> Tensor:
        """Read `count` rows from `start` on, in the stored type, to the device; valid until the next call."""
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
                target = buffer[(low - start) * width : (high - start) * width]
                span.file.read_into(target, span.offset + (low - first) * width)
            first += span.rows
        return raw.view(dtype).view(count, columns).to(self._device)


def _square(block: Tensor) -> Tensor:
    """Compute a block's squared norm in fp32 (to about 1e-6), returned in fp64."""
    import torch

    flat = block.reshape(-1)
    return torch.dot(flat, flat).double()


def _is_rounding(one: Tensor, other: Tensor) -> bool:
    """Return whether every entry of one matrix is as near to the other's as rounding to bf16 or fp16 is.

    So it is if one is the other in such a type, also if it was stored in a longer one afterwards, or if both are the
    same numbers in bf16 and fp16. A fine-tune moves some of the entries that rounding does not move.
    """
    import torch

    unexplained = (one - other).abs_()
    for exact in (one, other):
        for dtype in (torch.bfloat16, torch.float16):
            rounding = (exact - exact.to(dtype).to(exact.dtype)).abs_()
            unexplained = unexplained.where(unexplained > rounding, 0.0)
    return not bool(unexplained.any())


def _item_bytes(differences: Sequence[WeightDifference]) -> tuple[int, int]:
    """Return the bytes of an item in the files, and in fp32."""
    shapes = [difference.checkpoint.matrix_shape(difference.weight) for difference in differences]
    stored = sum(span.size for difference in differences for span in difference.spans())
    return stored, sum(rows * columns * 4 for rows, columns in shapes)


def _read_ahead(differences: Sequence[WeightDifference]) -> None:
    for difference in differences:
        for span in difference.spans():
            span.file.will_need(span.offset, span.size)
