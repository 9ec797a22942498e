"""Patch adapters in one pass over the weights of the aligned and the base model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

from stayaligned.defenses import Execution, ModelPair, PatchedAdapter
from stayaligned.defenses.patching.layers import (
    LayerPatcher,
    LayerSelector,
    PatchedLayer,
    ProjectedLayer,
    patch_and_report,
    select_layers,
    skip_layer,
)
from stayaligned.defenses.patching.sources import open_source
from stayaligned.weights.concatenation import layers_by_module, module_of, with_ranks

if TYPE_CHECKING:
    from stayaligned.algorithms.alignment_delta import AlignmentDelta
    from stayaligned.algorithms.safe_lora import LoraFactors
    from stayaligned.weights.adapters import Adapter, LoraLayer


def patch_adapters(
    selector: LayerSelector,
    patcher: LayerPatcher,
    adapters: Sequence[Adapter],
    models: ModelPair,
    how: Execution,
    *,
    raises_rank: bool = False,
) -> list[PatchedAdapter]:
    """Patch the layers that `selector` selects in each adapter, in one pass over the models' weights.

    Memory: the adapters twice, and what `deltas.stream` holds. Time: one pass over the weights for any number of
    adapters, and products that grow with the sum of their ranks.

    Raises:
        StayalignedError: if adapters, aligned and base don't fit together, or no layer of an adapter can be changed.
    """
    from stayaligned.algorithms.safe_lora import move_powers, powers_of_two

    source = open_source(models, selector.name)
    if raises_rank:
        for adapter in adapters:
            layers_by_module(adapter)  # raises before the work if its rank can't be changed
    placed, notes = zip(*(source.layers_of(adapter) for adapter in adapters), strict=True)
    users: dict[str, list[tuple[int, LoraLayer]]] = {}
    for index, layers in enumerate(placed):
        for layer in layers:
            users.setdefault(layer.name, []).append((index, layer))

    def patch_users(name: str, delta: AlignmentDelta) -> list[PatchedLayer]:
        before = [adapters[index].factors(layer).to(how.device) for index, layer in users[name]]
        skipped = [skip_layer(name, delta, update) for update in before]
        live = [i for i, report in enumerate(skipped) if report is None]
        done = [PatchedLayer(update, report) for update, report in zip(before, skipped, strict=True) if report]
        if live:
            powers = [powers_of_two(before[i]) for i in live]
            scaled = [move_powers(before[i], power) for i, power in zip(live, powers, strict=True)]
            operator = selector.operator_for(delta)
            images = operator.map_all(scaled)
            for i, power, one, image in zip(live, powers, scaled, images, strict=True):
                patched = patch_and_report(ProjectedLayer(name, delta, operator, one, image), patcher)
                update = move_powers(cast("LoraFactors", patched.update), (-power[0], -power[1]))
                # Held in memory until every layer is known, so in the precision of the adapter's file.
                index, layer = users[name][i]
                update = adapters[index].to_stored_dtype(layer, update)
                done.insert(i, patched._replace(update=update))
        return done

    found: list[dict[str, tuple[LoraLayer, PatchedLayer]]] = [{} for _ in adapters]
    for name, patched in source.visit(list(users), patch_users, how):
        for (index, layer), one in zip(users[name], patched, strict=True):
            found[index][name] = layer, one
    in_order = [{layer.name: one[layer.name] for layer in layers} for layers, one in zip(placed, found, strict=True)]
    return [_apply_selected(selector, models, *each) for each in zip(adapters, in_order, notes, strict=True)]


def _apply_selected(
    selector: LayerSelector,
    models: ModelPair,
    adapter: Adapter,
    found: Mapping[str, tuple[LoraLayer, PatchedLayer]],
    notes: Sequence[str],
) -> PatchedAdapter:
    selected = select_layers(selector, [patched.report for _, patched in found.values()], models, adapter.directory)
    changed: dict[LoraLayer, LoraFactors] = {
        layer: cast("LoraFactors", patched.update)
        for name, (layer, patched) in found.items()
        if name in selected.chosen
    }
    reports = [selected.finish(patched.report) for _, patched in found.values()]
    if all(len(update.a) == layer.rank for layer, update in changed.items()):
        return PatchedAdapter(adapter.with_factors(changed), reports, notes)
    return PatchedAdapter(
        with_ranks(adapter, {module_of(each): update for each, update in changed.items()}), reports, notes
    )
