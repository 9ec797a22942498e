"""Patch full fine-tunes layer by layer: ΔW = W_ft - W_aligned is a matrix, and weights are written shard by shard."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping, Sequence, Set
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

from stayaligned.core.errors import StayalignedError
from stayaligned.core.files import copyable_files
from stayaligned.core.records import LayerReport
from stayaligned.defenses import Execution, ModelPair
from stayaligned.defenses.patching.ancestry import check_ancestry, check_records
from stayaligned.defenses.patching.layers import (
    NO_DIRECTION,
    LayerExchanger,
    LayerPatcher,
    LayerSelector,
    ProjectedLayer,
    patch_and_report,
    report_unchanged,
    select_layers,
    skip_layer,
)
from stayaligned.weights.adapters import all_finite
from stayaligned.weights.checkpoints import Checkpoint, Weight, open_checkpoint
from stayaligned.weights.deltas import (
    Delta,
    WeightDifference,
    WeightOverlap,
    check_pairs,
    equal_layers_error,
    pair_weights,
    stream,
)
from stayaligned.weights.subspace_file import SubspaceFile

if TYPE_CHECKING:
    from torch import Tensor

    from stayaligned.algorithms.alignment_delta import AlignmentDelta
    from stayaligned.hf.placement.layers import PlacedWeight

_Items = dict[str, tuple[WeightDifference, ...]]

_SMALL_UPDATE = 1e-12
"""Norm of an update below which it is scaled before products are computed in fp32."""
_WEIGHT_SUFFIXES = frozenset({".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf"})


def patch_weights(
    selector: LayerSelector, patcher: LayerPatcher, finetuned: Checkpoint, out: Path, models: ModelPair, how: Execution
) -> list[LayerReport]:
    """Compute W ← W_aligned + P(W_ft - W_aligned) in the selected layers and write it over copies of the shards.

    Equation 4 of the paper with the aligned model as the origin, as its text says (W_pt is the model that was
    fine-tuned; measured from the base, a projected layer would lose the alignment itself). Every linear weight can be
    selected, except the output embedding's; embeddings, norms and biases keep their fine-tuned values.

    Memory: one layer's matrices, and VVᵀ. Time: V and ΔW are both full, so the paper's C costs 4·out²·in flops a layer.

    Args:
        selector: selects the layers and gives the operator.
        patcher: computes the new update of a selected layer.
        finetuned: the fine-tuned checkpoint; only read.
        out: an empty directory, for copies of the checkpoint's files with the changed weights.
        models: the aligned model, and its base or a subspace file.
        how: device and progress.

    Raises:
        StayalignedError: if the three checkpoints don't fit together.
    """
    from stayaligned.hf.placement.layers import linear_weights

    aligned = open_checkpoint(models.require_aligned(selector.name))
    base = open_checkpoint(models.require_base(selector.name)) if models.subspace is None else None
    subspace = _open_subspace(models.subspace, aligned) if models.subspace is not None else None
    placed = linear_weights(*(c for c in (aligned, finetuned, base) if c is not None))
    layers = {weight.name: weight for weight in placed}
    if subspace is not None and (lacking := [name for name in layers if name not in subspace.header.modules]):
        raise StayalignedError(
            f"{models.subspace} lacks {len(lacking)} of the model's layers: {', '.join(lacking[:5])}",
            hint="Rebuild the file from this model: `stayaligned subspace build`.",
        )
    patching = _Patching(selector, patcher, layers, models, aligned, finetuned, base, subspace)
    items = patching.items()  # raises before gigabytes are copied if the checkpoints don't fit together
    refuse_not_finite(finetuned, {block.name for weight in placed for block in weight.stored[1]})
    copy_checkpoint(finetuned, out)
    by_itself = selector.lowest is None and not isinstance(selector, LayerExchanger)
    if by_itself and models.subspace is None:  # each layer is selected by its own similarity
        reports = patching.run(items, None, out, how)
        select_layers(selector, reports, models, finetuned.directory)  # raises if no layer can be changed
        return [report if report.selected else report_unchanged(report) for report in reports]
    # Which layers are the lowest, decided or exchanged is known only after a pass over all, and their matrices don't
    # fit in memory: two passes.
    reports = patching.run(items, frozenset(), out, how)
    selected = select_layers(selector, reports, models, finetuned.directory)
    if selected.chosen:
        patching.run(items, selected.chosen, out, replace(how, note=lambda _: None))
    return [selected.finish(report) for report in reports]


def _open_subspace(path: Path, aligned: Checkpoint) -> SubspaceFile:
    file = SubspaceFile(path)
    file.refuse_other_model(aligned)
    return file


def refuse_not_finite(checkpoint: Checkpoint, placed: Set[str]) -> None:
    """Raise if a tensor that is copied as it is holds NaN or infinity; the others are checked when they are patched."""
    for name in checkpoint.keys() - placed:
        tensor = checkpoint[name]
        if tensor.is_floating_point() and not all_finite(tensor.float()):
            raise StayalignedError(
                f"{checkpoint.directory}: {name} holds NaN or infinity",
                hint="Train or download the model again: training diverged, or the file is damaged.",
            )


def copy_checkpoint(checkpoint: Checkpoint, out: Path) -> None:
    """Copy the shards and the files without weights, but no second set of weights: it would stay unpatched."""
    shards = set(checkpoint.shards().values())
    for name in {*shards, *(file.name for file in copyable_files(checkpoint.directory, is_copied)[0])}:
        shutil.copyfile(checkpoint.directory / name, out / name)


def is_copied(name: str) -> bool:
    """Return whether a file of a fine-tuned model is copied as it is: by its name, it holds no weights."""
    return Path(name).suffix not in _WEIGHT_SUFFIXES


class _Patching(NamedTuple):
    """What every pass over the weights of up to three checkpoints needs."""

    selector: LayerSelector
    patcher: LayerPatcher
    layers: Mapping[str, PlacedWeight]
    models: ModelPair
    aligned: Checkpoint
    finetuned: Checkpoint
    base: Checkpoint | None
    subspace: SubspaceFile | None

    def run(self, items: _Items, selected: frozenset[str] | None, out: Path, how: Execution) -> list[LayerReport]:
        """Write the selected layers, and report every layer as if it were selected.

        Args:
            items: what `items()` returned.
            selected: the layers to write; None selects each layer by its own similarity, and marks the others.
            out: the directory with the copies of the shards.
            how: device and progress.
        """
        reports: list[LayerReport] = []
        closer_to_base: list[bool] = []
        overlaps: tuple[dict[str, WeightOverlap], dict[str, WeightOverlap]] = {}, {}
        with ExitStack() as files:
            writer = WeightWriter(self.finetuned, out, files)

            def patch_one(name: str, differences: list[Delta]) -> LayerReport:
                for found, difference in zip(overlaps, (differences[0], *differences[2:]), strict=False):
                    if difference.overlap is not None:
                        found[name] = difference.overlap
                if self.base is not None:  # V + ΔW is W_ft - W_base
                    update, _, v = (difference.value for difference in differences)
                    closer_to_base.append(bool((v + update).norm() < update.norm()))
                return self._patch_layer(name, differences, selected, writer)

            for _, report in stream(items, patch_one, device=how.device, progress=how.progress):
                reports.append(report)
        if self.base is not None and reports and all(report.skipped in NO_DIRECTION for report in reports):
            raise equal_layers_error(self.aligned, self.base, len(reports))
        self._check_ancestry(overlaps, how)
        if closer_to_base and sum(closer_to_base) > len(closer_to_base) / 2:
            raise StayalignedError(
                f"{self.finetuned.directory} is closer to the base than to the aligned model: they look swapped",
                hint="Swap them: `aligned` is the model that was fine-tuned, `base` its unaligned ancestor.",
            )
        return reports

    def _check_ancestry(self, overlaps: Sequence[Mapping[str, WeightOverlap]], how: Execution) -> None:
        """Raise unless the fine-tuned checkpoint and the base are related to the aligned model."""
        entries = {name: math.prod(self.aligned.matrix_shape(w.stored[0])) for name, w in self.layers.items()}
        allowed = self.models.allow_mismatch
        notes = [check_records(self.aligned, self.base, allowed=allowed)] if self.base is not None else []
        for other, role, found in zip((self.finetuned, self.base), ("fine-tuned", "base"), overlaps, strict=True):
            if other is not None:
                notes.append(check_ancestry(self.aligned, other, found, role=role, entries=entries, allowed=allowed))
        for note in notes:
            if note is not None:
                how.note(note)

    def items(self) -> _Items:
        """Return {layer: ΔW, the aligned weight, and V unless a subspace file holds it}, ready to be streamed."""
        weights = {name: placed.stored for name, placed in self.layers.items()}
        check_pairs(
            self.aligned,
            self.finetuned,
            {name: (stored[0], stored[1]) for name, stored in weights.items()},
            role="fine-tuned",
            hint="Give the fine-tuned checkpoint that was trained from the aligned model.",
        )
        items: _Items = {
            name: (WeightDifference(self.finetuned, ft, self.aligned, al), WeightDifference(self.aligned, al, None, ()))
            for name, (al, ft, *_) in weights.items()
        }
        if self.base is None:
            return items
        directions = pair_weights(self.aligned, self.base, {name: (w[0], w[2]) for name, w in weights.items()})
        return {name: (*items[name], *directions[name]) for name in items}

    def _patch_layer(
        self, name: str, differences: list[Delta], selected: frozenset[str] | None, writer: WeightWriter
    ) -> LayerReport:
        from stayaligned.algorithms.alignment_delta import FullDelta
        from stayaligned.algorithms.safe_lora import scale_update

        placed = self.layers[name]
        update, origin = (d.value.T if placed.transposed else d.value for d in differences[:2])
        delta: AlignmentDelta
        if self.subspace is not None:
            delta = self.subspace.delta(name).to(str(update.device))
        else:
            v = differences[2]
            delta = FullDelta(v.value.T if placed.transposed else v.value, v.norm, v.rounding)
        skipped = skip_layer(name, delta, update, rounded=differences[0].rounding)
        if skipped is not None:
            return skipped
        operator = self.selector.operator_for(delta)
        # The products of very small updates would underflow; the power of two is undone below.
        power = 2.0 ** -math.frexp(differences[0].norm)[1] if differences[0].norm < _SMALL_UPDATE else 1.0
        scaled = scale_update(update, power) if power != 1.0 else update
        patched, report = patch_and_report(
            ProjectedLayer(name, delta, operator, scaled, operator(scaled)), self.patcher
        )
        report = report.model_copy(update={"update_norm": report.update_norm / power})
        chosen = self.selector.select({name: report.similarity}) if selected is None else selected
        if name not in chosen:
            return report if selected is not None else report.model_copy(update={"selected": False})
        weight = origin + cast("Tensor", patched if power == 1.0 else scale_update(patched, 1 / power))
        writer.write(placed.stored[1], weight.T if placed.transposed else weight, name)
        return report


class WeightWriter:
    """Overwrites weights in copies of a checkpoint's shards."""

    def __init__(self, original: Checkpoint, out: Path, files: ExitStack) -> None:
        self._original = original
        self._descriptors: dict[str, int] = {}
        for shard in sorted(set(original.shards().values())):
            stream = files.enter_context((out / shard).open("r+b"))
            self._descriptors[shard] = stream.fileno()

    def write(self, weight: Weight, matrix: Tensor, name: str) -> None:
        """Write a matrix, oriented as the file stores it, into its blocks in the stored type.

        Raises:
            StayalignedError: if a value overflows the type.
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
