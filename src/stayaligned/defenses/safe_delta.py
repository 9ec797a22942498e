"""Safe Delta: keep the entries of a full update that cost the least safety, and make up for them."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import LayerReport
from stayaligned.defenses import Execution, ModelPair, PatchDefense, PatchedAdapter

if TYPE_CHECKING:
    from torch import Tensor

    from stayaligned.defenses.patching.full_update import FullUpdate
    from stayaligned.defenses.patching.full_weights import WeightWriter
    from stayaligned.weights.adapters import Adapter
    from stayaligned.weights.checkpoints import Checkpoint
    from stayaligned.weights.deltas import Delta

_MOST_BYTES = 2 << 30
"""Size of the Hessians in memory at a time."""


class SafeDelta(PatchDefense):
    """Keep the entries of an update that cost the least safety, and compensate.

    Starting from the aligned weight, entries of W_ft - W_aligned are taken in the order of their utility for each unit
    of safety, δ²/(δ²/U_jj²), until the budget s is used up, by an optimal brain surgeon with H = (2/N) Σ x xᵀ, x the
    layer's inputs of the aligned model on N alignment rows (arXiv 2505.12038); the columns after each change make up
    for it. Blocks of 2048 columns, groups of 4, the damping and the 15 % that are never kept are the code's.

    Differences from the code: s is stated for 4096 × 4096 entries and scales with the number of entries, also in a last
    block of fewer columns, where the code gives that block a whole budget; the rows are the first ones, in the model's
    chat template, without system prompts of attacks; and embeddings, norms, biases and the head keep their fine-tuned
    values, as in the other patches of this project, where the code returns the aligned ones.

    An adapter's update would be dense afterwards: merge it first. Cost: the aligned model in memory and 2 GiB of
    Hessians at a time, each group of layers with one forward pass over the rows, and a Cholesky inverse of each. s
    depends on the size of the update, and the default may keep nothing of a small model's: compare several, and each
    with `shrink` of all layers with the `factor` that the record shows.

    Example:
        >>> SafeDelta(strength=0.2).patches_adapters
        False
    """

    name: ClassVar[str] = "safe_delta"
    paper: ClassVar[str] = "https://arxiv.org/abs/2505.12038"
    needs_base: ClassVar[bool] = False
    needs_alignment_data: ClassVar[bool] = True
    patches_full_weights: ClassVar[bool] = True
    patches_adapters: ClassVar[bool] = False

    strength: float = Field(default=0.1, ge=0, allow_inf_nan=False)
    """Budget s of safety that the kept entries may cost."""
    rows: int = Field(default=128, ge=1)
    """Number of alignment rows, the first of the file, on which the inputs are measured."""
    max_length: int = Field(default=512, ge=1)
    """Number of tokens at which a row is cut."""

    def patch(self, adapter: Adapter, models: ModelPair) -> PatchedAdapter:
        """Refuse an adapter."""
        raise StayalignedError(
            f"{adapter.directory}: {self.name} changes single entries of weights, which an adapter can't hold",
            hint="Merge the adapter into the model (`merge_and_unload`), save it, and give that directory.",
        )

    def patch_model(self, finetuned: Checkpoint, out: Path, models: ModelPair, how: Execution) -> list[LayerReport]:
        """Write the selected and compensated weights over a copy of the checkpoint, group by group."""
        from stayaligned.defenses.patching.full_update import FullUpdate
        from stayaligned.defenses.patching.full_weights import WeightWriter, copy_checkpoint
        from stayaligned.hf.input_grams import InputGrams

        examples = models.require_alignment_examples(self.name)[: self.rows]
        update = FullUpdate(self.name, finetuned, models)
        grams = InputGrams(
            models.require_aligned(self.name), models.chat_template, examples, max_length=self.max_length
        )
        copy_checkpoint(finetuned, out)
        reports: list[LayerReport] = []
        with ExitStack() as files:
            writer = WeightWriter(finetuned, out, files)
            for group in update.groups(_MOST_BYTES):
                hessians = grams.compute(group)

                def change(name: str, differences: list[Delta], hessians: dict[str, Tensor] = hessians) -> LayerReport:
                    return self._change(name, differences, 2 / len(examples) * hessians[name], update, writer)

                reports.extend(update.visit(group, change, how))
        update.check_ancestry(how)
        return reports

    def _change(
        self, name: str, differences: list[Delta], hessian: Tensor, update: FullUpdate, writer: WeightWriter
    ) -> LayerReport:
        from stayaligned.algorithms.safe_delta import inverse_factor, safe_delta
        from stayaligned.algorithms.safe_lora import compare

        delta, aligned = update.matrices(name, differences)
        factor = inverse_factor(hessian.to(aligned))
        new = safe_delta(aligned, aligned + delta, factor, self.strength)
        found = compare(delta, new - aligned)
        writer.write(*update.stored(name, new), name)
        return LayerReport(
            module=name,
            similarity=found.similarity,
            shrinkage=found.shrinkage,
            selected=found.norm > 0,
            update_norm=found.norm,
            skipped=None if found.norm else "zero_update",
        )
