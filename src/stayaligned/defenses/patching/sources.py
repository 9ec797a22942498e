"""Sources of each layer's V: two checkpoints, or a subspace file."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from stayaligned.defenses import Execution, ModelPair
from stayaligned.defenses.patching.ancestry import check_ancestry, check_records, check_trained_on
from stayaligned.weights.checkpoints import Weight, open_checkpoint
from stayaligned.weights.deltas import Delta, WeightOverlap, equal_layers_error, pair_weights, stream
from stayaligned.weights.placement import place_plain_adapter
from stayaligned.weights.subspace_file import SubspaceFile
from stayaligned.weights.unsupported import note_on_whole

if TYPE_CHECKING:
    from stayaligned.algorithms.alignment_delta import AlignmentDelta
    from stayaligned.weights.adapters import Adapter, LoraLayer


T = TypeVar("T")


class DeltaSource(Protocol):
    """Gives the V of each layer of an adapter."""

    def layers_of(self, adapter: Adapter) -> tuple[list[LoraLayer], Sequence[str]]:
        """Return the adapter's layers, checked against the source, and notes for the adapter's record."""
        ...

    def visit(
        self, names: Sequence[str], work: Callable[[str, AlignmentDelta], T], how: Execution
    ) -> Iterator[tuple[str, T]]:
        """Call `work` with each named layer's V; yield (name, result) in any order."""
        ...


class CheckpointSource:
    """Streams V from the aligned checkpoint and its base."""

    def __init__(self, aligned: str | Path, base: str | Path, *, allow_mismatch: bool = False) -> None:
        self._refs = str(aligned), str(base)
        self._aligned, self._base = open_checkpoint(aligned), open_checkpoint(base)
        self._allowed = allow_mismatch
        self._stored: dict[str, tuple[Weight, Weight]] = {}
        self._transposed: dict[str, bool] = {}

    def layers_of(self, adapter: Adapter) -> tuple[list[LoraLayer], Sequence[str]]:
        """Place the adapter's layers by its configuration and the aligned model's."""
        placed = place_plain_adapter(adapter, self._aligned, self._base)
        if placed is None:
            from stayaligned.hf.placement.layers import place_adapter

            placed = place_adapter(adapter, self._aligned, self._base)
        trained_on = check_trained_on(adapter, self._aligned, self._base, self._refs, allowed=self._allowed)
        notes = trained_on, note_on_whole(adapter)
        for item in placed:
            self._stored[item.layer.name] = item.aligned, item.base
            self._transposed[item.layer.name] = item.layer.transposed
        return [item.layer for item in placed], [note for note in notes if note]

    def visit(
        self, names: Sequence[str], work: Callable[[str, AlignmentDelta], T], how: Execution
    ) -> Iterator[tuple[str, T]]:
        """Read and subtract the weights while `work` computes.

        Raises:
            StayalignedError: if aligned and base are equal in every layer, or have no common ancestor.
        """
        from stayaligned.algorithms.alignment_delta import FullDelta

        directions: list[bool] = []
        overlaps: dict[str, WeightOverlap] = {}

        def call_work(name: str, differences: list[Delta]) -> T:
            (v,) = differences
            directions.append(bool(v.norm) and not v.rounding)
            if v.overlap is not None:
                overlaps[name] = v.overlap
            return work(name, FullDelta(v.value.T if self._transposed[name] else v.value, v.norm, v.rounding))

        def file_position(name: str) -> tuple[str, int]:
            span = self._aligned.spans(self._stored[name][0])[0]
            return span.file.path.name, span.offset

        ordered = sorted(names, key=file_position)  # sequential reads are the fastest
        items = pair_weights(self._aligned, self._base, {name: self._stored[name] for name in ordered})
        note = check_records(self._aligned, self._base, allowed=self._allowed)
        if note is not None:
            how.note(note)
        yield from stream(items, call_work, device=how.device, progress=how.progress)
        if names and not any(directions):
            raise equal_layers_error(self._aligned, self._base, len(names))
        entries = {name: math.prod(self._aligned.matrix_shape(self._stored[name][0])) for name in names}
        note = check_ancestry(self._aligned, self._base, overlaps, entries=entries, allowed=self._allowed)
        if note is not None:
            how.note(note)


class SubspaceSource:
    """Reads the leading part of V from a subspace file."""

    def __init__(self, path: Path, aligned: str | Path | None) -> None:
        self._file = SubspaceFile(path)
        if aligned is not None:
            self._file.refuse_other_model(open_checkpoint(aligned))

    def layers_of(self, adapter: Adapter) -> tuple[list[LoraLayer], Sequence[str]]:
        """Match the adapter's tensors with the modules in the file."""
        notes = (self._file.refuse_mismatch(adapter), note_on_whole(adapter))
        return self._file.layers_of(adapter), [note for note in notes if note]

    def visit(
        self, names: Sequence[str], work: Callable[[str, AlignmentDelta], T], how: Execution
    ) -> Iterator[tuple[str, T]]:
        """Visit one module after the other in one thread: more threads slow down products this small."""
        import torch

        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            for name in names:
                yield name, work(name, self._file.delta(name).to(how.device))
        finally:
            torch.set_num_threads(threads)


def open_source(models: ModelPair, defense: str) -> DeltaSource:
    """Open the subspace file if there is one, else the two checkpoints."""
    if models.subspace is not None:
        return SubspaceSource(models.subspace, models.aligned)
    pair = models.require_aligned(defense), models.require_base(defense)
    return CheckpointSource(*pair, allow_mismatch=models.allow_mismatch)
