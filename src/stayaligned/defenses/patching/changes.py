"""Patches of adapters that need the aligned model alone: which layers there are, and what was done to each."""

from __future__ import annotations

from collections.abc import Sequence

from stayaligned.core.records import LayerReport
from stayaligned.defenses import ModelPair, PatchedAdapter
from stayaligned.defenses.patching.ancestry import check_trained_on
from stayaligned.weights.adapters import Adapter, LoraLayer
from stayaligned.weights.checkpoints import open_checkpoint
from stayaligned.weights.concatenation import layers_by_module, module_of
from stayaligned.weights.placement import place_plain_adapter
from stayaligned.weights.unsupported import note_on_whole


def place_on_aligned(
    adapter: Adapter, models: ModelPair, defense: str, whole: str = "copied unchanged"
) -> tuple[list[LoraLayer], list[str]]:
    """Return an adapter's layers under the aligned model's names, and notes for the record.

    Args:
        adapter: the adapter.
        models: the aligned model.
        defense: the patch's name, for errors.
        whole: what happens to weights that the adapter stores whole, for a note.

    Raises:
        StayalignedError: if the adapter does not fit the aligned model, or is known to be of another one.
    """
    ref = models.require_aligned(defense)
    aligned = open_checkpoint(ref)
    placed = place_plain_adapter(adapter, aligned, aligned)
    if placed is None:
        from stayaligned.hf.placement.layers import place_adapter

        placed = place_adapter(adapter, aligned, aligned)
    trained_on = check_trained_on(adapter, aligned, aligned, (str(ref), str(ref)), allowed=models.allow_mismatch)
    return [item.layer for item in placed], [note for note in (trained_on, note_on_whole(adapter, whole)) if note]


def report_changes(
    before: Adapter, after: Adapter, layers: Sequence[LoraLayer], notes: Sequence[str] = ()
) -> PatchedAdapter:
    """Return a patched adapter with a report of each layer: the cosine of both updates, and the norms.

    Args:
        before: the adapter as it was.
        after: the patched adapter; its ranks may differ.
        layers: the layers of `before`.
        notes: caveats for the readers of the record.
    """
    from stayaligned.algorithms.safe_lora import compare

    same_ranks = all(before.tensors[key].shape == tensor.shape for key, tensor in after.tensors.items())
    new = {} if same_ranks else layers_by_module(after)
    reports: list[LayerReport] = []
    for layer in layers:
        update = before.factors(layer)
        changed = not _is_same(layer, before, after)
        found = compare(update, after.factors(layer if same_ranks else new[module_of(layer)]))
        reports.append(
            LayerReport(
                module=layer.name,
                similarity=found.similarity,
                shrinkage=found.shrinkage if changed else 1.0,
                selected=changed,
                update_norm=found.norm,
                skipped=None if found.norm else "zero_update",
            )
        )
    return PatchedAdapter(after, reports, notes)


def _is_same(layer: LoraLayer, before: Adapter, after: Adapter) -> bool:
    """Return whether a layer has the same factors, but for a rank that was padded with zeros."""
    (a, b), (new_a, new_b) = (
        (adapter.tensors[layer.a_key], adapter.tensors[layer.b_key]) for adapter in (before, after)
    )
    rows = len(a)
    return new_a[:rows].equal(a) and new_b[:, : b.shape[1]].equal(b) and not bool(new_b[:, b.shape[1] :].any())
