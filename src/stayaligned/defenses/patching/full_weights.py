"""The layer-by-layer defenses on a full fine-tune: ΔW = W_ft - W_aligned as a matrix, written back shard by shard."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import LayerReport
from stayaligned.defenses import Execution, ModelPair
from stayaligned.defenses.patching.layers import (
    Edit,
    LayerSelector,
    ProjectedLayer,
    refuse_undirected,
    unselected,
    work_layer,
)

if TYPE_CHECKING:
    from torch import Tensor

    from stayaligned.algorithms.alignment_delta import AlignmentDelta
    from stayaligned.hf.placement.layers import PlacedWeight
    from stayaligned.weights.checkpoints import Checkpoint, Weight
    from stayaligned.weights.deltas import Delta, Difference
    from stayaligned.weights.subspace_file import SubspaceFile

    _Items = dict[str, tuple[Difference, ...]]

_WEIGHTS = frozenset({".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf"})


def patch_weights(
    selector: LayerSelector, edit: Edit, finetuned: Checkpoint, out: Path, models: ModelPair, how: Execution
) -> list[LayerReport]:
    """W ← W_aligned + P(W_ft - W_aligned) in the selected layers, written over the copies of the shards in `out`.

    Equation 4 of the paper with the aligned model as the origin, as its text says (W_pt is the model that was
    fine-tuned; measured from the base, a projected layer would lose the alignment itself). All linear weights take
    part but the output embedding's; embeddings, norms and biases stay as they were fine-tuned.

    Memory: one layer's matrices, and VVᵀ. Time: V and ΔW are both full, so the paper's C costs 4·out²·in flops a layer.

    Args:
        selector: selects the layers and gives the operator.
        edit: what selected layers get.
        finetuned: the fine-tuned checkpoint; only read.
        out: an empty directory: gets copies of its files, and the changed weights over those of its shards.
        models: the aligned model, and its base or a subspace file.
        how: device and progress.

    Raises:
        StayalignedError: if the three checkpoints don't fit together.
    """
    from stayaligned.hf.placement.layers import linear_weights
    from stayaligned.weights.checkpoints import open_checkpoint

    aligned = open_checkpoint(models.require_aligned(selector.name))
    base = open_checkpoint(models.require_base(selector.name)) if models.subspace is None else None
    subspace = _open_subspace(models.subspace, aligned) if models.subspace is not None else None
    placed = linear_weights(*(c for c in (aligned, finetuned, base) if c is not None))
    layers = {weight.name: weight for weight in placed}
    if subspace is not None and (lacking := [name for name in layers if name not in subspace.header.modules]):
        raise StayalignedError(
            f"{models.subspace} lacks {len(lacking)} of the model's layers: {', '.join(lacking[:5])}",
            hint="Build the file anew from this model.",
        )
    work = _Work(selector, edit, layers, aligned, finetuned, base, subspace)
    items = work.items()  # what doesn't fit together is said before gigabytes are copied
    _copy(finetuned, out)
    if selector.lowest is None:
        return work.run(items, None, out, how)
    # Which layers are the lowest is known when all have been seen, and their matrices don't fit in memory.
    seen = work.run(items, frozenset(), out, how)
    return work.run(items, selector.select({report.module: report.similarity for report in seen}), out, how)


def _open_subspace(path: Path, aligned: Checkpoint) -> SubspaceFile:
    from stayaligned.weights.subspace_file import SubspaceFile

    file = SubspaceFile(path)
    file.refuse_other_model(aligned)
    return file


def _copy(checkpoint: Checkpoint, out: Path) -> None:
    """Copy the shards, and what is no weight: of a second set of weights beside them, none would be changed."""
    shards = set(checkpoint.shards().values())
    for file in sorted(checkpoint.directory.glob("*")):
        if file.is_file() and (file.name in shards or file.suffix not in _WEIGHTS):
            shutil.copyfile(file, out / file.name)


class _Work(NamedTuple):
    """One pass over the weights of up to three checkpoints."""

    selector: LayerSelector
    edit: Edit
    layers: Mapping[str, PlacedWeight]
    aligned: Checkpoint
    finetuned: Checkpoint
    base: Checkpoint | None
    subspace: SubspaceFile | None

    def run(self, items: _Items, selected: frozenset[str] | None, out: Path, how: Execution) -> list[LayerReport]:
        """Report every layer and write the selected ones; None lets each layer's similarity decide."""
        from stayaligned.weights.deltas import refuse_equal, stream

        reports: list[LayerReport] = []
        without_direction: list[str] = []
        closer_to_base: list[bool] = []
        with ExitStack() as files:
            writer = _Writer(self.finetuned, out, files)

            def one(name: str, differences: list[Delta]) -> LayerReport | None:
                if self.base is not None:  # V + ΔW is W_ft - W_base
                    update, _, v = (difference.value for difference in differences)
                    closer_to_base.append(bool((v + update).norm() < update.norm()))
                return self._layer(name, differences, selected, writer)

            for name, report in stream(items, one, device=how.device, progress=how.progress):
                if report is None:
                    without_direction.append(name)
                else:
                    reports.append(report)
        refuse_undirected(self.selector, without_direction)
        if self.base is not None and reports and not any(report.delta_norm for report in reports):
            raise refuse_equal(self.aligned, self.base)
        if closer_to_base and sum(closer_to_base) > len(closer_to_base) / 2:
            raise StayalignedError(
                f"{self.finetuned.directory} is closer to the base than to the aligned model: they look swapped",
                hint="`aligned` is the model that was fine-tuned, `base` its unaligned ancestor.",
            )
        return reports

    def items(self) -> _Items:
        """ΔW, the aligned weight itself, and V unless a subspace file has it."""
        from stayaligned.weights.deltas import Difference, check_pairs, paired

        weights = {name: placed.stored for name, placed in self.layers.items()}
        check_pairs(
            self.aligned,
            self.finetuned,
            {name: (stored[0], stored[1]) for name, stored in weights.items()},
            role="fine-tuned",
            hint="The fine-tuned checkpoint must have been trained from the aligned one.",
        )
        items: _Items = {
            name: (Difference(self.finetuned, ft, self.aligned, al), Difference(self.aligned, al, None, ()))
            for name, (al, ft, *_) in weights.items()
        }
        if self.base is None:
            return items
        directions = paired(self.aligned, self.base, {name: (w[0], w[2]) for name, w in weights.items()})
        return {name: (*items[name], *directions[name]) for name in items}

    def _layer(
        self, name: str, differences: list[Delta], selected: frozenset[str] | None, writer: _Writer
    ) -> LayerReport | None:
        from stayaligned.algorithms.alignment_delta import FullDelta

        placed = self.layers[name]
        update, origin = (d.value.T if placed.transposed else d.value for d in differences[:2])
        delta: AlignmentDelta
        if self.subspace is not None:
            delta = self.subspace.delta(name).to(str(update.device))
        else:
            v = differences[2]
            delta = FullDelta(v.value.T if placed.transposed else v.value, v.norm)
        operator = self.selector.operator_for(delta)
        if operator is None:
            return None
        edited, report = work_layer(ProjectedLayer(name, delta, operator, update, operator(update)), self.edit)
        chosen = self.selector.select({name: report.similarity}) if selected is None else selected
        if name not in chosen:
            return unselected(report)
        weight = origin + cast("Tensor", edited)
        writer.write(placed.stored[1], weight.T if placed.transposed else weight, name)
        return report


class _Writer:
    """Writes weights over their places in copies of a checkpoint's shards."""

    def __init__(self, original: Checkpoint, out: Path, files: ExitStack) -> None:
        self._original = original
        self._descriptors: dict[str, int] = {}
        for shard in sorted(set(original.shards().values())):
            stream = files.enter_context((out / shard).open("r+b"))
            self._descriptors[shard] = stream.fileno()

    def write(self, weight: Weight, matrix: Tensor, name: str) -> None:
        """Put a matrix, oriented as it is stored, where its blocks lie, in the stored type.

        Raises:
            StayalignedError: if it does not fit the type.
        """
        import torch

        start = 0
        for span in self._original.spans(weight):
            rows = matrix[start : start + span.rows].to(torch.device("cpu"), span.dtype).contiguous()
            if not bool(rows.isfinite().all()):
                raise StayalignedError(
                    f"{name}: the changed weight overflows {span.dtype}", hint="Save the checkpoint in bf16 or fp32."
                )
            content, offset = memoryview(rows.view(torch.uint8).numpy().data).cast("B"), span.offset
            while content:
                written = os.pwrite(self._descriptors[span.file.path.name], content, offset)
                content, offset = content[written:], offset + written
            start += span.rows
