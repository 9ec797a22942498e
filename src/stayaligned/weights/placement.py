"""Placement of plain adapters: which weight of two checkpoints each LoRA layer changes."""

from __future__ import annotations

from dataclasses import dataclass

from stayaligned.weights.adapter_config import refuse_slow_patterns
from stayaligned.weights.adapters import Adapter, LoraLayer
from stayaligned.weights.checkpoints import Checkpoint, Weight, whole_tensor
from stayaligned.weights.lora_layout import place_by_name
from stayaligned.weights.unsupported import check_factors, refuse_quantized, refuse_unsupported


@dataclass(frozen=True, slots=True)
class PlacedLayer:
    """A LoRA layer, and the weight that it changes in both checkpoints."""

    layer: LoraLayer
    aligned: Weight
    """The weight as the aligned checkpoint stores it."""
    base: Weight
    """The weight as the base stores it."""


def place_plain_adapter(adapter: Adapter, aligned: Checkpoint, base: Checkpoint) -> list[PlacedLayer] | None:
    """Return the layers of an adapter whose names are enough to place it, as `hf.placement.layers.place_adapter`.

    Returns:
        None if only PEFT and transformers can place the adapter, or find the error in it.

    Raises:
        StayalignedError: if the adapter is not supported, or its factors don't fit the weights.
    """
    refuse_unsupported(adapter)
    for checkpoint in (aligned, base):
        refuse_quantized(checkpoint)
    names = {name.removesuffix(".weight") for name in aligned} | adapter.modules()
    refuse_slow_patterns(adapter.directory, adapter.config, names)
    layers = place_by_name(adapter, aligned, base)
    if layers is None:
        return None
    check_factors(adapter, layers, aligned.directory)
    return [PlacedLayer(layer, whole_tensor(layer.parameter), whole_tensor(layer.parameter)) for layer in layers]
