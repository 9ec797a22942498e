"""Where the V of a layer comes from: two checkpoints, or a subspace file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from stayaligned.defenses import Execution, ModelPair

if TYPE_CHECKING:
    from stayaligned.algorithms.alignment_delta import AlignmentDelta
    from stayaligned.weights.adapters import Adapter, LoraLayer


T = TypeVar("T")


class DeltaSource(Protocol):
    """Where the V of a layer comes from: a pair of checkpoints, or a subspace file."""

    def layers_of(self, adapter: Adapter) -> tuple[list[LoraLayer], Sequence[str]]:
        """The adapter's layers, checked against the source, and notes for its record."""
        ...

    def visit(
        self, names: Sequence[str], work: Callable[[str, AlignmentDelta], T], how: Execution
    ) -> Iterator[tuple[str, T]]:
        """Call `work` with each named layer's V; yields (name, result), in whatever order suits the source."""
        ...


class CheckpointPair:
    """V streamed from the aligned checkpoint and its base."""

    def __init__(self, aligned: str | Path, base: str | Path) -> None:
        from stayaligned.weights.checkpoints import Weight, open_checkpoint

        self._aligned, self._base = open_checkpoint(aligned), open_checkpoint(base)
        self._stored: dict[str, tuple[Weight, Weight]] = {}
        self._transposed: dict[str, bool] = {}

    def layers_of(self, adapter: Adapter) -> tuple[list[LoraLayer], Sequence[str]]:
        """By the adapter's configuration on the aligned model."""
        from stayaligned.hf.placement.layers import place_adapter, refuse_swapped

        note = refuse_swapped(adapter, self._aligned, self._base)
        placed = place_adapter(adapter, self._aligned, self._base)
        for item in placed:
            self._stored[item.layer.name] = item.aligned, item.base
            self._transposed[item.layer.name] = item.layer.transposed
        return [item.layer for item in placed], [note] if note else []

    def visit(
        self, names: Sequence[str], work: Callable[[str, AlignmentDelta], T], how: Execution
    ) -> Iterator[tuple[str, T]]:
        """Read and subtract while computing; an error if nothing differs at all."""
        from stayaligned.algorithms.alignment_delta import FullDelta
        from stayaligned.weights.deltas import Delta, paired, refuse_equal, stream

        norms: list[float] = []

        def one(name: str, differences: list[Delta]) -> T:
            ((_, value, norm),) = differences
            norms.append(norm)
            return work(name, FullDelta(value.T if self._transposed[name] else value, norm))

        def place(name: str) -> tuple[str, int]:
            span = self._aligned.spans(self._stored[name][0])[0]
            return span.file.path.name, span.offset

        # Along the files, which is what disks and the system's read-ahead like.
        ordered = sorted(names, key=place)
        items = paired(self._aligned, self._base, {name: self._stored[name] for name in ordered})
        yield from stream(items, one, device=how.device, progress=how.progress)
        if names and not any(norms):
            raise refuse_equal(self._aligned, self._base)


class SubspaceSource:
    """V's leading part from a subspace file."""

    def __init__(self, path: Path, aligned: str | Path | None) -> None:
        from stayaligned.weights.checkpoints import open_checkpoint
        from stayaligned.weights.subspace_file import SubspaceFile

        self._file = SubspaceFile(path)
        if aligned is not None:
            self._file.refuse_other_model(open_checkpoint(aligned))

    def layers_of(self, adapter: Adapter) -> tuple[list[LoraLayer], Sequence[str]]:
        """By the adapter's tensors, against the modules in the file."""
        note = self._file.refuse_mismatch(adapter)
        return self._file.layers_of(adapter), [note] if note else []

    def visit(
        self, names: Sequence[str], work: Callable[[str, AlignmentDelta], T], how: Execution
    ) -> Iterator[tuple[str, T]]:
        """One module after the other in one thread: for products this small, others cost more than they save."""
        import torch

        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            for name in names:
                yield name, work(name, self._file.delta(name).to(how.device))
        finally:
            torch.set_num_threads(threads)


def open_source(models: ModelPair, defense: str) -> DeltaSource:
    """The subspace file if there is one, else the two checkpoints."""
    if models.subspace is not None:
        return SubspaceSource(models.subspace, models.aligned)
    return CheckpointPair(models.require_aligned(defense), models.require_base(defense))
