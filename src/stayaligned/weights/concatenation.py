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

    # PEFT adds a copy of the weight of a head that is tied to the embedding.
    factors = {key: tensor for key, tensor in adapter.tensors.items() if ".lora_" in key}
    layers = plain_layers(replace(adapter, tensors=factors), shape_of)
    if layers is None or adapter.config.get("target_parameters"):
        raise StayalignedError(
            f"{adapter.directory}: only an adapter with one A and one B for each linear module, as its configuration "
            "says, can be joined with another",
            hint="Train without experts and embeddings in its targets, or merge it into the model.",
        )
    check_factors(adapter, layers, adapter.directory)
    return {layer.name: layer for layer in layers}


def module_of(layer: LoraLayer) -> str:
    """Return the module of a layer as the adapter's file names it."""
    return layer.a_key.removeprefix(PREFIX).partition(".lora_")[0]


def concatenate(adapter: Adapter, further: Mapping[str, LoraFactors]) -> Adapter:
    """Return the adapter whose update is BA plus the further one, exactly but for rounding B₂ to the stored type.

    A', B' = [A; A₂], [B, B₂/s], with the adapter's scaling s; its own factors keep their bits. Ranks and alphas are
    those of `with_ranks`.

    Args:
        adapter: the adapter.
        further: {module: factors of any rank and scaling}, as the adapter's file names the modules. A module that the
            adapter does not have is added to its targets.

    Raises:
        StayalignedError: if the adapter has another layout, shapes differ, or a factor is not finite or overflows.
    """
    import torch

    layers = layers_by_module(adapter)
    shared = next(iter(layers.values())).scaling
    new: dict[str, LoraFactors] = {}
    for module, added in further.items():
        layer = layers.get(module)
        _refuse_misfit(module, layer, added)
        scaling = layer.scaling if layer else shared
        value = _stored(adapter, module, layer or next(iter(layers.values())), added, scaling)
        if layer is not None:
            own = adapter.tensors[layer.a_key], adapter.tensors[layer.b_key]
            value = value._replace(a=torch.cat([own[0], value.a]), b=torch.cat([own[1], value.b], dim=1))
        new[module] = value
    return with_ranks(adapter, new)


def with_ranks(adapter: Adapter, factors: Mapping[str, LoraFactors]) -> Adapter:
    """Return the adapter with new factors of any rank in some modules, and ranks and alphas that keep its scalings.

    An adapter whose scaling is the same in all layers, without patterns, gets one rank for all of them (the others are
    padded with zeros) and no pattern, which servers may ignore. Any other gets a rank and an alpha for each module.

    Args:
        adapter: the adapter.
        factors: {module: its new factors, of the adapter's scaling}; a new module is added to the targets.

    Raises:
        StayalignedError: if the adapter has another layout, or a factor is not finite or overflows.
    """
    import torch

    layers = layers_by_module(adapter)
    first = next(iter(layers.values()))
    patterned = bool(adapter.config.get("rank_pattern") or adapter.config.get("alpha_pattern"))
    found: dict[str, tuple[Tensor, Tensor]] = {
        module: (adapter.tensors[layer.a_key], adapter.tensors[layer.b_key]) for module, layer in layers.items()
    }
    scalings = {module: layer.scaling for module, layer in layers.items()}
    for module, value in factors.items():
        scalings.setdefault(module, first.scaling)
        stored = _stored(adapter, module, layers.get(module, first), value, scalings[module])
        found[module] = stored.a, stored.b
    tensors = dict(adapter.tensors)
    rank = max(len(a) for a, _ in found.values())
    ranks: dict[str, int] = {}
    for module in sorted(found, key=natural_key):
        a, b = found[module]
        ranks[module] = len(a) if patterned else rank
        missing = ranks[module] - len(a)
        tensors[f"{PREFIX}{module}.lora_A.weight"] = torch.nn.functional.pad(a, (0, 0, 0, missing)).contiguous()
        tensors[f"{PREFIX}{module}.lora_B.weight"] = torch.nn.functional.pad(b, (0, missing)).contiguous()
    added = not factors.keys() <= layers.keys()
    config = _configure(adapter.config, ranks, scalings, patterned=patterned, added=added)
    return replace(adapter, config=MappingProxyType(config), tensors=MappingProxyType(tensors))


def _stored(adapter: Adapter, module: str, like: LoraLayer, value: LoraFactors, scaling: float) -> LoraFactors:
    """Return factors with another scaling, in the types in which the adapter stores a layer.

    Raises:
        StayalignedError: if they are not finite.
    """
    if value.scaling != scaling:
        value = value._replace(b=value.b * (value.scaling / scaling), scaling=scaling)
    types = adapter.tensors[like.a_key].dtype, adapter.tensors[like.b_key].dtype
    stored = value if (value.a.dtype, value.b.dtype) == types else adapter.to_stored_dtype(like, value)
    if not (all_finite(stored.a) and all_finite(stored.b)):
        raise StayalignedError(
            f"{module}: the new factors are not finite in {stored.b.dtype}",
            hint="Save the adapter in fp32 or bf16 first.",
        )
    return stored


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
