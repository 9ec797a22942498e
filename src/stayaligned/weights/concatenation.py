"""Join further low-rank factors to an adapter's own: B' = [B, B₂] and A' = [A; A₂], whose product is BA + B₂A₂."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from stayaligned.core.errors import StayalignedError
from stayaligned.weights.adapter_config import refuse_slow_patterns
from stayaligned.weights.adapters import PREFIX, Adapter, LoraLayer, all_finite
from stayaligned.weights.lora_layout import natural_key, plain_layers
from stayaligned.weights.unsupported import check_factors, refuse_unsupported

if TYPE_CHECKING:
    from torch import Tensor

    from stayaligned.algorithms.safe_lora import LoraFactors

_PLACES = ("exclude_modules", "layers_to_transform", "layers_pattern")
"""Settings that restrict `target_modules`, and must go where it lists every module."""


def layers_by_module(adapter: Adapter) -> dict[str, LoraLayer]:
    """Return {module in the adapter's file: its layer}, in natural order.

    Raises:
        StayalignedError: if the adapter is more than one A and one B for each module (DoRA, trained biases, stacks of
            experts, embeddings), or is damaged.
    """
    refuse_unsupported(adapter)
    refuse_slow_patterns(adapter.directory, adapter.config, adapter.modules())

    def shape_of(module: str) -> tuple[int, ...] | None:
        a, b = (adapter.tensors.get(f"{PREFIX}{module}.lora_{factor}.weight") for factor in "AB")
        return None if a is None or b is None else (b.shape[0], a.shape[-1])

    layers = plain_layers(adapter, shape_of)
    if layers is None or adapter.config.get("target_parameters"):
        raise StayalignedError(
            f"{adapter.directory}: only an adapter with one A and one B for each linear module, as its configuration "
            "says, can be joined with another",
            hint="Train without experts and embeddings in its targets, or merge it into the model.",
        )
    check_factors(adapter, layers, adapter.directory)
    return {layer.name: layer for layer in layers}


def concatenate(adapter: Adapter, further: Mapping[str, LoraFactors]) -> Adapter:
    """Return the adapter whose update is BA plus the further one, exactly but for rounding B₂ to the stored type.

    A', B' = [A; A₂], [B, B₂/s], with the adapter's scaling s; its own factors keep their bits. An adapter whose
    scaling is the same in all layers, without patterns, gets one rank for all of them (the others are padded with
    zeros) and no pattern, which servers may ignore. Any other gets a rank and an alpha for each module.

    Args:
        adapter: the adapter.
        further: {module: factors of any rank and scaling}, as the adapter's file names the modules. A module that the
            adapter does not have is added to its targets.

    Raises:
        StayalignedError: if the adapter has another layout, shapes differ, or a factor is not finite or overflows.
    """
    import torch

    layers = layers_by_module(adapter)
    like = next(iter(layers.values()))
    shared = like.scaling
    patterned = bool(adapter.config.get("rank_pattern") or adapter.config.get("alpha_pattern"))
    joined: dict[str, tuple[Tensor, Tensor]] = {}
    scalings: dict[str, float] = {}
    for module in sorted({*layers, *further}, key=natural_key):
        layer, added = layers.get(module), further.get(module)
        scalings[module] = layer.scaling if layer else shared
        parts = [(adapter.tensors[layer.a_key], adapter.tensors[layer.b_key])] if layer else []
        if added is not None:
            _refuse_misfit(module, layer, added)
            scaled = added._replace(b=added.b * (added.scaling / scalings[module]))
            stored = adapter.to_stored_dtype(layer or like, scaled)
            if not (all_finite(stored.a) and all_finite(stored.b)):
                raise StayalignedError(
                    f"{module}: the factors to join are not finite in {stored.b.dtype}",
                    hint="Save the adapter in fp32 or bf16 first.",
                )
            parts.append((stored.a, stored.b))
        joined[module] = torch.cat([a for a, _ in parts]), torch.cat([b for _, b in parts], dim=1)
    tensors = dict(adapter.tensors)
    rank = max(len(a) for a, _ in joined.values())
    for module, (a, b) in joined.items():
        if not patterned:
            missing = rank - len(a)
            a, b = (torch.nn.functional.pad(a, (0, 0, 0, missing)), torch.nn.functional.pad(b, (0, missing)))
        joined[module] = a, b
        tensors |= {f"{PREFIX}{module}.lora_{key}.weight": value.contiguous() for key, value in (("A", a), ("B", b))}
    ranks = {module: len(a) for module, (a, _) in joined.items()}
    config = _configure(adapter.config, ranks, scalings, patterned=patterned, added=not further.keys() <= layers.keys())
    return replace(adapter, config=MappingProxyType(config), tensors=MappingProxyType(tensors))


def _configure(
    config: Mapping[str, Any], ranks: Mapping[str, int], scalings: Mapping[str, float], *, patterned: bool, added: bool
) -> dict[str, Any]:
    """Return the configuration with new ranks, and the alphas that give the scalings."""
    stabilized = bool(config.get("use_rslora"))
    alphas = {module: s * (math.sqrt(ranks[module]) if stabilized else ranks[module]) for module, s in scalings.items()}
    alphas = {module: round(alpha) if alpha.is_integer() else alpha for module, alpha in alphas.items()}
    first = next(iter(ranks))
    settings: dict[str, Any] = {"r": ranks[first], "lora_alpha": alphas[first], "rank_pattern": {}, "alpha_pattern": {}}
    if patterned:
        for name, values in (("rank_pattern", ranks), ("alpha_pattern", alphas)):
            settings[name] = {f"^{re.escape(module)}": value for module, value in values.items()}
    if added:
        settings["target_modules"] = sorted(ranks)
    kept = {name: value for name, value in config.items() if not (added and name in _PLACES)}
    return {**kept, **settings}


def _refuse_misfit(module: str, layer: LoraLayer | None, added: LoraFactors) -> None:
    """Raise unless factors fit each other and the layer, if the adapter has it."""
    inner = added.a.dim() == added.b.dim() == 2 and added.a.shape[0] == added.b.shape[1]
    needed = (layer.out_features, layer.in_features) if layer else None
    if not inner or (needed and needed != (added.b.shape[0], added.a.shape[1])):
        expected = f"(r, {layer.in_features}) and ({layer.out_features}, r)" if layer else "(r, in) and (out, r)"
        raise StayalignedError(
            f"{module}: factors of the shapes {tuple(added.a.shape)} and {tuple(added.b.shape)} can't be joined to an "
            f"adapter that needs {expected}",
            hint="Use an adapter of the same model.",
        )
