"""Patch adapters in one pass over the weights of the aligned and the base model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from stayaligned.defenses import Execution, ModelPair, PatchedAdapter
from stayaligned.defenses.patching.layers import (
    Edit,
    LayerSelector,
    ProjectedLayer,
    WorkedLayer,
    refuse_undirected,
    unselected,
    work_layer,
)
from stayaligned.defenses.patching.sources import open_source

if TYPE_CHECKING:
    from stayaligned.algorithms.alignment_delta import AlignmentDelta
    from stayaligned.algorithms.safe_lora import LoraFactors, Operator
    from stayaligned.weights.adapters import Adapter, LoraLayer


def patch_adapters(
    selector: LayerSelector, edit: Edit, adapters: Sequence[Adapter], models: ModelPair, how: Execution
) -> list[PatchedAdapter]:
    """Stream V past every layer of the adapters, select by `selector`, and put in the edits of the selected layers.

    Memory: the adapters twice, and what `deltas.stream` holds. Time: one pass over the weights whatever the number of
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

    def work(name: str, delta: AlignmentDelta) -> list[WorkedLayer] | None:
        operator = selector.operator_for(delta)
        if operator is None:
            return None
        before = [adapters[index].factors(layer).to(how.device) for index, layer in users[name]]
        after = together(operator, before)
        worked = (
            work_layer(ProjectedLayer(name, delta, operator, x, y), edit) for x, y in zip(before, after, strict=True)
        )
        # Kept until the last layer is seen, so in the adapter's own precision.
        return [
            one._replace(update=adapters[i].stored(layer, cast("LoraFactors", one.update)))
            for one, (i, layer) in zip(worked, users[name], strict=True)
        ]

    found: list[dict[str, tuple[LoraLayer, WorkedLayer]]] = [{} for _ in adapters]
    without_direction: list[str] = []
    for name, worked in source.visit(list(users), work, how):
        if worked is None:
            without_direction.append(name)
        for (index, layer), one in zip(users[name], worked or (), strict=worked is not None):
            found[index][name] = layer, one
    refuse_undirected(selector, without_direction)
    in_order = [{layer.name: one[layer.name] for layer in layers} for layers, one in zip(placed, found, strict=True)]
    return [_assemble(selector, *each) for each in zip(adapters, in_order, notes, strict=True)]


def together(operator: Operator, updates: Sequence[LoraFactors]) -> list[LoraFactors]:
    """The operator on several updates in one product: it acts on each column of B and each row of A alone."""
    import torch

    from stayaligned.algorithms.safe_lora import LoraFactors

    ranks = [update.b.shape[1] for update in updates]
    stacked = torch.cat([update.a for update in updates])
    outputs = operator.outputs(torch.cat([update.b for update in updates], dim=1)).split(ranks, dim=1)
    mapped = operator.inputs(stacked)
    # An A that stays is the same tensor, by which its Gram matrix is known again.
    inputs = [update.a for update in updates] if mapped is stacked else mapped.split(ranks)
    return [LoraFactors(a, b, update.scaling) for a, b, update in zip(inputs, outputs, updates, strict=True)]


def _assemble(
    selector: LayerSelector,
    adapter: Adapter,
    found: Mapping[str, tuple[LoraLayer, WorkedLayer]],
    notes: Sequence[str],
) -> PatchedAdapter:
    selected = selector.select({name: worked.report.similarity for name, (_, worked) in found.items()})
    reports = [w.report if name in selected else unselected(w.report) for name, (_, w) in found.items()]
    edits: dict[LoraLayer, Any] = {layer: worked.update for name, (layer, worked) in found.items() if name in selected}
    return PatchedAdapter(adapter.with_factors(edits), reports, notes)
