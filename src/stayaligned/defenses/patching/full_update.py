"""The update of a full fine-tune as matrices, for patches that need the aligned model alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from stayaligned.core.records import LayerReport
from stayaligned.defenses import Execution, ModelPair
from stayaligned.defenses.patching.ancestry import check_ancestry
from stayaligned.defenses.patching.full_weights import refuse_not_finite
from stayaligned.weights.checkpoints import Checkpoint, Weight, open_checkpoint
from stayaligned.weights.deltas import Delta, WeightDifference, WeightOverlap, check_pairs, stream


class FullUpdate:
    """The linear weights of an aligned model and of its fine-tune, read layer by layer.

    Args:
        defense: the defense's name, for the error.
        finetuned: the fine-tuned checkpoint.
        models: the aligned model.

    Raises:
        StayalignedError: if the two checkpoints don't fit together.
    """

    def __init__(self, defense: str, finetuned: Checkpoint, models: ModelPair) -> None:
        from stayaligned.hf.placement.layers import linear_weights

        self._aligned, self._finetuned = open_checkpoint(models.require_aligned(defense)), finetuned
        self._allowed = models.allow_mismatch
        placed = linear_weights(self._aligned, finetuned)
        self._layers = {weight.name: weight for weight in placed}
        self._overlaps: dict[str, WeightOverlap] = {}
        check_pairs(
            self._aligned,
            finetuned,
            {weight.name: (weight.stored[0], weight.stored[1]) for weight in placed},
            role="fine-tuned",
            hint="Give the fine-tuned checkpoint that was trained from the aligned model.",
        )
        refuse_not_finite(finetuned, {block.name for weight in placed for block in weight.stored[1]})

    def groups(self, most_bytes: int) -> Iterator[list[str]]:
        """Yield the names of all layers, in groups whose matrices (in, in) in fp32 have at most that many bytes."""
        group, size = list[str](), 0
        for name, weight in self._layers.items():
            rows, columns = self._aligned.matrix_shape(weight.stored[0])
            needed = 4 * (rows if weight.transposed else columns) ** 2
            if group and size + needed > most_bytes:
                yield group
                group, size = [], 0
            group.append(name)
            size += needed
        yield group

    def visit(
        self, names: Sequence[str], work: Callable[[str, list[Delta]], LayerReport], how: Execution
    ) -> Iterator[LayerReport]:
        """Call `work` with each layer's W_ft - W_aligned and W_aligned; yield what it returns, in any order."""

        def call(name: str, differences: list[Delta]) -> LayerReport:
            if differences[0].overlap is not None:
                self._overlaps[name] = differences[0].overlap
            return work(name, differences)

        items: dict[str, tuple[WeightDifference, ...]] = {}
        for name in names:
            aligned, finetuned = self._layers[name].stored
            items[name] = (
                WeightDifference(self._finetuned, finetuned, self._aligned, aligned),
                WeightDifference(self._aligned, aligned, None, ()),
            )
        for _, report in stream(items, call, device=how.device, progress=how.progress):
            yield report

    def matrices(self, name: str, differences: Sequence[Delta]) -> list[Tensor]:
        """Return the layer's matrices as (out, in)."""
        return [each.value.T if self._layers[name].transposed else each.value for each in differences]

    def stored(self, name: str, matrix: Tensor) -> tuple[Weight, Tensor]:
        """Return where the fine-tuned checkpoint stores a layer, and the matrix (out, in) as it is stored."""
        layer = self._layers[name]
        return layer.stored[1], matrix.T if layer.transposed else matrix

    def check_ancestry(self, how: Execution) -> None:
        """Raise unless the visited layers of both checkpoints are alike; note it if that is allowed."""
        entries = {
            name: math.prod(self._aligned.matrix_shape(weight.stored[0])) for name, weight in self._layers.items()
        }
        note = check_ancestry(
            self._aligned, self._finetuned, self._overlaps, role="fine-tuned", entries=entries, allowed=self._allowed
        )
        if note is not None:
            how.note(note)
