"""Patch adapters in one pass over the weights of the aligned and the base model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from stayaligned.defenses import Execution, ModelPair, PatchedAdapter
from stayaligned.defenses.patching.layers import (
    LayerPatcher,
    LayerSelector,
    PatchedLayer,
    ProjectedLayer,
    patch_and_report,
    refuse_zero_deltas,
    report_unchanged,
)
from stayaligned.defenses.patching.sources import open_source

if TYPE_CHECKING:
    from stayaligned.algorithms.alignment_delta import AlignmentDelta
    from stayaligned.algorithms.safe_lora import LoraFactors, Operator
    from stayaligned.weights.adapters import Adapter, LoraLayer


def patch_adapters(
    selector: LayerSelector, patcher: LayerPatcher, adapters: Sequence[Adapter], models: ModelPair, how: Execution
) -> list[PatchedAdapter]:
    """Patch the layers that `selector` selects in each adapter, in one pass over the models' weights.

    Memory: the adapters twice, and what `deltas.stream` holds. Time: one pass over the weights for any number of
    adapters, and products that grow with the sum of their ranks.

    Raises:
        StayalignedError: if adapters, aligned and base don't fit together, or V is zero where the operator needs it.
    """
    source = open_source(models, selector.name)
    placed, notes = zip(*(source.layers_of(adapter) for adapter in adapters), strict=True)
    users: dict[str, list[tuple[int, LoraLayer]]] = {}
    for index, layers in enumerate(placed):
        for layer in layers:
            users.setdefault(layer.name, []).append((index, layer))

    def patch_users(name: str, delta: AlignmentDelta) -> list[PatchedLayer] | None:
        operator = selector.operator_for(delta)
        if operator is None:
            return None
        before = [adapters[index].factors(layer).to(how.device) for index, layer in users[name]]
        after = map_updates(operator, before)
        patched = (
            patch_and_report(ProjectedLayer(name, delta, operator, x, y), patcher)
            for x, y in zip(before, after, strict=True)
        )
        # Held in memory until every layer is known, so in the precision of the adapter's file.
        return [
            one._replace(update=adapters[index].to_stored_dtype(layer, cast("LoraFactors", one.update)))
            for one, (index, layer) in zip(patched, users[name], strict=True)
        ]

    found: list[dict[str, tuple[LoraLayer, PatchedLayer]]] = [{} for _ in adapters]
    without_direction: list[str] = []
    for name, patched in source.visit(list(users), patch_users, how):
        if patched is None:
            without_direction.append(name)
        for (index, layer), one in zip(users[name], patched or (), strict=patched is not None):
            found[index][name] = layer, one
    refuse_zero_deltas(selector, without_direction)
    in_order = [{layer.name: one[layer.name] for layer in layers} for layers, one in zip(placed, found, strict=True)]
    return [_apply_selected(selector, *each) for each in zip(adapters, in_order, notes, strict=True)]


def map_updates(operator: Operator, updates: Sequence[LoraFactors]) -> list[LoraFactors]:
    """Apply the operator to several updates in one product: it maps each column of B and each row of A separately."""
    import torch

    from stayaligned.algorithms.safe_lora import LoraFactors

    ranks = [update.b.shape[1] for update in updates]
    stacked = torch.cat([update.a for update in updates])
    outputs = operator.map_outputs(torch.cat([update.b for update in updates], dim=1)).split(ranks, dim=1)
    mapped = operator.map_inputs(stacked)
    # `compare` reuses the Gram matrix of an A that is the same tensor before and after.
    inputs = [update.a for update in updates] if mapped is stacked else mapped.split(ranks)
    return [LoraFactors(a, b, update.scaling) for a, b, update in zip(inputs, outputs, updates, strict=True)]


def _apply_selected(
    selector: LayerSelector,
    adapter: Adapter,
    found: Mapping[str, tuple[LoraLayer, PatchedLayer]],
    notes: Sequence[str],
) -> PatchedAdapter:
    selected = selector.select({name: patched.report.similarity for name, (_, patched) in found.items()})
    reports = [
        patched.report if name in selected else report_unchanged(patched.report) for name, (_, patched) in found.items()
    ]
    changed: dict[LoraLayer, Any] = {
        layer: patched.update for name, (layer, patched) in found.items() if name in selected
    }
    return PatchedAdapter(adapter.with_factors(changed), reports, notes)
