"""Determine which weights an adapter changes, and where two checkpoints store them.

Plain adapters are placed by name (`weights.placement`). All others are placed by PEFT's own injection into a model
without weights, so that rank patterns, regular expressions, experts and tied weights have PEFT's meaning, and by
transformers' loading rules (`stored`). Adapters that `algorithms.safe_lora` can't patch exactly raise an error
(`weights.unsupported`).
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stayaligned.core.errors import StayalignedError
from stayaligned.core.host_versions import installed_version
from stayaligned.hf.hosts import knows_expert_layouts
from stayaligned.hf.placement.stored import StoredWeights, meta_model, meta_models
from stayaligned.weights.adapter_config import refuse_slow_patterns
from stayaligned.weights.adapters import PREFIX, Adapter, LoraLayer
from stayaligned.weights.checkpoints import Block, Checkpoint, Weight, whole_tensor
from stayaligned.weights.lora_layout import natural_key, other_names, translate, under_stored_names
from stayaligned.weights.placement import PlacedLayer, place_plain_adapter
from stayaligned.weights.unsupported import (
    PLACEMENT,
    check_factors,
    list_names,
    stored_whole,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

_INPUTS_FIRST = ("Llama4TextExperts",)
"""Modules whose experts are stored as (in, out) without `is_transposed`, so that PEFT treats them as (out, in)."""


@dataclass(frozen=True, slots=True)
class PlacedWeight:
    """A linear map of the model, in one or more checkpoints."""

    name: str
    """Name of the map; equal to the `LoraLayer.name` of an adapter on it."""
    transposed: bool
    """Whether the weight is stored as (in, out)."""
    stored: tuple[Weight, ...]
    """The weight as each checkpoint stores it."""


def place_adapter(adapter: Adapter, aligned: Checkpoint, base: Checkpoint) -> list[PlacedLayer]:
    """Return the adapter's layers in natural order of their names, each with its weight in both checkpoints.

    Every tensor is checked. Only that both checkpoints store weights of equal shapes is left to `deltas.pair_weights`.

    Args:
        adapter: the adapter as read from disk.
        aligned: the model that the adapter was trained on.
        base: that model's ancestor; names, shards and storage type may differ.

    Raises:
        StayalignedError: if the adapter is not supported or does not fit the model, or a checkpoint lacks a weight or
            stores it in an unsupported layout.
    """
    plain = place_plain_adapter(adapter, aligned, base)
    if plain is not None:
        return plain
    models = meta_models(aligned)
    names = {model: other_names(adapter, _module_names(model)) for model in models}
    # the class that has the adapter's names, or else one with the same text model, or else the error for the first
    model = next((m for m in models if names[m] == {}), next((m for m in models if names[m]), models[0]))
    in_aligned = StoredWeights(aligned, model)
    layers = _layers_on(adapter, in_aligned, aligned, names[model] or {})
    parameters = [layer.parameter for layer in layers]
    in_base = in_aligned if base is aligned else StoredWeights(base, _model_like(model, base))
    places = in_aligned.find(parameters), in_base.find(parameters)
    return [PlacedLayer(layer, *(place[layer.parameter][layer.expert or 0] for place in places)) for layer in layers]


def linear_weights(*checkpoints: Checkpoint) -> list[PlacedWeight]:
    """Return every linear map that LoRA on "all-linear" and experts changes, in natural order of their names.

    These are the linear modules except the head, each expert of mixtures, and their routers; not embeddings,
    convolutions, norms or biases. A weight that several modules share appears once.

    Args:
        checkpoints: at least one; the configuration of the first determines the modules.

    Raises:
        StayalignedError: if a checkpoint lacks a weight, or stores it in an unsupported layout.
    """
    first = meta_model(checkpoints[0])
    models = [first, *(_model_like(first, checkpoint) for checkpoint in checkpoints[1:])]
    maps = dict(_linear_parameters(models[0]))
    found: list[dict[str, tuple[Weight, ...]]] = []
    for checkpoint, model in zip(checkpoints, models, strict=True):
        try:
            found.append(StoredWeights(checkpoint, model).find(maps))
        except StayalignedError as error:
            if type(model) is type(first):
                raise
            raise StayalignedError(
                f"{checkpoints[0].directory} is a {type(first).__name__}, but {checkpoint.directory} a "
                f"{type(model).__name__} without all of its layers",
                hint="Give two checkpoints of one architecture. Of a model that reads images, give the whole model or "
                "its text model for both; an adapter of the text model can be patched with either.",
            ) from error
    placed: dict[Weight, PlacedWeight] = {}
    for parameter, transposed in maps.items():
        for expert, stored in enumerate(zip(*(each[parameter] for each in found), strict=True)):
            stacked = models[0].get_parameter(parameter).ndim == 3
            name = _layer_name(parameter, expert if stacked else None)
            placed.setdefault(stored[0], PlacedWeight(name, transposed, stored))
    return sorted(placed.values(), key=lambda weight: natural_key(weight.name))


def _model_like(model: PreTrainedModel, checkpoint: Checkpoint) -> PreTrainedModel:
    """Return the checkpoint's model without weights, of the class of another model if there is one."""
    models = meta_models(checkpoint)
    return next((each for each in models if type(each) is type(model)), models[0])


def _layers_on(
    adapter: Adapter, stored: StoredWeights, checkpoint: Checkpoint, names: Mapping[str, str]
) -> list[LoraLayer]:
    """Return the layers that PEFT creates for the adapter's configuration, checked against the adapter's tensors."""
    translated = translate(adapter, names) if names else adapter
    injected = _inject(translated, copy.deepcopy(stored.model))
    layers = [layer for name, module in injected.items() for layer in _convert_layer(name, module, adapter)]
    layers = under_stored_names(layers, names)
    expected = {key for layer in layers for key in (layer.a_key, layer.b_key)}
    missing = sorted(expected - adapter.tensors.keys())
    others = adapter.tensors.keys() - expected - {*stored_whole(adapter.tensors)}
    unexpected = sorted(_without_copies(adapter, others, stored, checkpoint))
    if missing or unexpected or not layers:
        raise StayalignedError(
            f"{adapter.directory}: the adapter's tensors don't match its configuration on "
            f"{checkpoint.directory}. Missing: {list_names(missing)}. Not expected: {list_names(unexpected)}",
            hint="Give the model that the adapter was trained on.",
        )
    check_factors(adapter, layers, checkpoint.directory)
    return sorted(layers, key=lambda layer: natural_key(layer.name))


def translate_adapter(adapter: Adapter, model: PreTrainedModel) -> Adapter:
    """Return an adapter of another class with the same text model under the names of this model.

    Returns:
        The same adapter if the model has its names, or if it lacks one of its modules under every name.

    Raises:
        StayalignedError: if the configuration does not target a module that has factors.
    """
    names = other_names(adapter, _module_names(model))
    return translate(adapter, names) if names else adapter


def _module_names(model: PreTrainedModel) -> set[str]:
    return {name for name, _ in model.named_modules()}


def _inject(adapter: Adapter, model: PreTrainedModel) -> dict[str, Any]:
    """Return {module name: PEFT's LoRA layer}; raise if PEFT creates layers of an unsupported kind."""
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import Embedding, Linear, ParamWrapper
    from peft.tuners.lora import LoraLayer as PeftLayer

    refuse_slow_patterns(adapter.directory, adapter.config, [name for name, _ in model.named_modules()])
    settings: dict[str, Any] = {name: adapter.config[name] for name in PLACEMENT if name in adapter.config}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice on training: fan_in_fan_out, tied weights
            injected = inject_adapter_in_model(LoraConfig(**settings), model, low_cpu_mem_usage=True)
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, re.error) as error:
        raise StayalignedError(
            f"{adapter.directory}: PEFT can't place the adapter on a {type(model).__name__}: {error}",
            hint="Give the model that the adapter was trained on.",
        ) from error
    layers = {name: module for name, module in injected.named_modules() if isinstance(module, PeftLayer)}
    supported = (Linear, Embedding, ParamWrapper)
    others = [f"{name} ({type(module).__name__})" for name, module in layers.items() if type(module) not in supported]
    if others:
        raise StayalignedError(
            f"{adapter.directory}: only LoRA on linear layers, embeddings and experts is supported, not "
            f"{list_names(others)}",
            hint="Train an adapter that targets linear modules only.",
        )
    return layers


def _convert_layer(name: str, module: Any, adapter: Adapter) -> Iterator[LoraLayer]:
    """Convert a PEFT layer to LoraLayers: one, or one for each expert of a stack."""
    from peft.tuners.lora import Embedding, ParamWrapper
    from transformers.pytorch_utils import Conv1D

    kind: type = type(module)
    base: torch.nn.Module = module.get_base_layer()
    # PEFT nests the wrappers of several parameters of one module: `experts`, `experts.base_layer`.
    path = name.replace(".base_layer", "")
    parameter, transposed, stacked = f"{path}.weight", isinstance(base, Conv1D), False
    a_key, b_key = (f"{PREFIX}{name}.lora_{factor}.weight" for factor in "AB")
    if kind is Embedding:
        transposed = True  # (vocabulary, hidden): a one-hot vector goes in
        a_key, b_key = (f"{PREFIX}{name}.lora_embedding_{factor}" for factor in "AB")
    if kind is ParamWrapper:
        parameter = f"{path}.{module.parameter_name}"
        weight: Tensor = module.get_param()
        stacked, transposed = weight.ndim == 3, getattr(base, "is_transposed", False)
        _refuse_parameter(adapter, parameter, weight, base)
    experts = int(module.num_experts) if stacked else 1
    for expert in range(experts) if stacked else (None,):
        yield LoraLayer(
            name=_layer_name(parameter, expert),
            parameter=parameter,
            a_key=a_key,
            b_key=b_key,
            rank=module.r["default"],
            scaling=module.scaling["default"],
            in_features=module.in_features,
            out_features=module.out_features,
            transposed=transposed,
            expert=expert,
            experts=experts,
        )


def _refuse_parameter(adapter: Adapter, parameter: str, weight: Tensor, module: torch.nn.Module) -> None:
    """Raise if a targeted parameter is not a linear map, or PEFT would confuse its inputs and outputs."""
    is_linear_map = _is_linear_map(parameter, weight, module)
    if is_linear_map and weight.ndim == 3 and not knows_expert_layouts():
        raise StayalignedError(
            f"{adapter.directory}: target_parameters: {parameter}: PEFT {installed_version('peft')} swaps the inputs "
            "and outputs of stacked experts",
            hint="pip install 'peft>=0.19', and train the adapter with it.",
        )
    if is_linear_map and type(module).__name__ not in _INPUTS_FIRST:
        single = weight.ndim == 3 and weight.shape[0] == 1
        if not (single and getattr(module, "is_transposed", False)):  # PEFT does not transpose a single expert
            return
    shape = "×".join(map(str, weight.shape))
    raise StayalignedError(
        f"{adapter.directory}: target_parameters: {parameter} ({shape}, of a {type(module).__name__}) is not supported",
        hint="Target linear modules, routers, and experts whose layout PEFT knows: (experts, out, in) or "
        "(experts, in, out).",
    )


def _is_linear_map(parameter: str, weight: Tensor, module: torch.nn.Module) -> bool:
    """Return whether a parameter is stored as (out, in), or as one matrix per expert. Conv1D is handled elsewhere."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv1D)):
        return False
    if weight.ndim == 3:  # not in recurrent networks: RWKV's mixing vectors, the gates of an RG-LRU
        return getattr(module, "num_experts", None) == weight.shape[0]
    return weight.ndim == 2 and parameter.endswith(".weight")


def _linear_parameters(model: PreTrainedModel) -> Iterator[tuple[str, bool]]:
    """Yield (name, whether it is stored as (in, out)) of the parameters for `linear_weights`."""
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    for path, module in model.named_modules():
        for name, weight in module.named_parameters(prefix=path, recurse=False):
            if isinstance(module, Conv1D) and weight.ndim == 2:
                yield name, True
            elif module is not head and _is_linear_map(name, weight, module):
                transposed = getattr(module, "is_transposed", False) or type(module).__name__ in _INPUTS_FIRST
                yield name, transposed and weight.ndim == 3


def _layer_name(parameter: str, expert: int | None) -> str:
    return parameter.removesuffix(".weight") + ("" if expert is None else f"[{expert}]")


def _without_copies(adapter: Adapter, keys: set[str], stored: StoredWeights, checkpoint: Checkpoint) -> set[str]:
    """Return `keys` without copies of the model's weights, which PEFT saves with LoRA on embeddings or the head.

    Raises:
        StayalignedError: if such a copy differs from the model's weight.
    """
    import torch

    names = {key: key.removeprefix(PREFIX).replace(".base_layer", "") for key in keys if key.startswith(PREFIX)}
    parameters = stored.parameters
    copies = {
        key: name
        for key, name in names.items()
        if name in parameters and (parameters[name].ndim == 2 or name in checkpoint)  # PEFT also copies a head's bias
    }
    places = stored.find(name for name in copies.values() if parameters[name].ndim == 2)
    for key, name in copies.items():
        blocks = places[name][0] if name in places else whole_tensor(name)
        weight = torch.cat([_read_block(checkpoint, block) for block in blocks])
        copied = adapter.tensors[key]
        if not (torch.equal(copied.to(weight.dtype), weight) or torch.equal(copied, weight.to(copied.dtype))):
            raise StayalignedError(
                f"{adapter.directory}: {key} is not the weight of {checkpoint.directory}",
                hint="Use the model that the adapter was trained on; adapters that also trained this weight are not "
                "supported.",
            )
    return keys - copies.keys()


def _read_block(checkpoint: Checkpoint, block: Block) -> Tensor:
    stored = checkpoint[block.name] if block.expert is None else checkpoint[block.name][block.expert]
    return stored[block.first_row :][: block.rows]
