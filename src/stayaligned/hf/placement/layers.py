"""Which weights an adapter changes, and where two checkpoints store them.

Plain adapters are placed by name (`plain`). All others by PEFT's own injection into a model without weights, so that
rank patterns, regular expressions, experts and tied weights mean here what they mean there, and by transformers' own
loading rules (`stored`). What the maths of `projection` does not cover exactly is refused by name (`refusals`).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stayaligned.core.errors import StayalignedError
from stayaligned.hf.placement.stored import StoredWeights, meta_model
from stayaligned.weights.adapters import Adapter, LoraLayer
from stayaligned.weights.checkpoints import Block, Checkpoint, Weight, weights_fingerprint, whole
from stayaligned.weights.lora_layout import PREFIX, natural_key, plainly_placed
from stayaligned.weights.unsupported import PLACEMENT, check_factors, refuse_quantised, refuse_unsupported, some

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

_INPUTS_FIRST = ("Llama4TextExperts",)
"""Modules whose experts are stored (in, out) without saying so to PEFT, which takes them for (out, in)."""


@dataclass(frozen=True, slots=True)
class PlacedLayer:
    """A LoRA layer and the weight that it changes, in both checkpoints."""

    layer: LoraLayer
    aligned: Weight
    """Where the aligned checkpoint stores it."""
    base: Weight
    """Where the base stores it."""


@dataclass(frozen=True, slots=True)
class PlacedWeight:
    """A linear map of the model, in every checkpoint given."""

    name: str
    """As the `LoraLayer.name` of an adapter on it."""
    transposed: bool
    """Whether it is stored as (in, out)."""
    stored: tuple[Weight, ...]
    """Where each checkpoint stores it."""


def place_adapter(adapter: Adapter, aligned: Checkpoint, base: Checkpoint) -> list[PlacedLayer]:
    """The adapter's layers, in natural order of their names, each with its weight in both checkpoints.

    That the weights have equal shapes in both is left to `deltas.paired`; all else is checked here, tensor by tensor.

    Args:
        adapter: the adapter as read from disk.
        aligned: the model that it was trained on.
        base: that model's ancestor; names, shards and storage type may differ.

    Raises:
        StayalignedError: if the adapter uses what is not supported or does not fit the model, or a checkpoint lacks a
            weight or stores it in a layout whose rows can't be told.
    """
    refuse_unsupported(adapter)
    for checkpoint in (aligned, base):
        refuse_quantised(checkpoint)
    layers = plainly_placed(adapter, aligned, base)
    if layers is not None:
        check_factors(adapter, layers, aligned.directory)
        return [PlacedLayer(layer, whole(layer.parameter), whole(layer.parameter)) for layer in layers]
    in_aligned = StoredWeights(aligned, meta_model(aligned))
    layers = _layers_on(adapter, in_aligned, aligned)
    parameters = [layer.parameter for layer in layers]
    in_base = in_aligned if base is aligned else StoredWeights(base, meta_model(base))
    places = in_aligned.find(parameters), in_base.find(parameters)
    return [PlacedLayer(layer, *(place[layer.parameter][layer.expert or 0] for place in places)) for layer in layers]


def lora_layers(adapter: Adapter, checkpoint: Checkpoint) -> list[LoraLayer]:
    """The adapter's LoRA layers on the model that it was trained on, where no base is at hand.

    Raises:
        StayalignedError: as `place_adapter`.
    """
    return [placed.layer for placed in place_adapter(adapter, checkpoint, checkpoint)]


def linear_weights(*checkpoints: Checkpoint) -> list[PlacedWeight]:
    """Every linear map of the model, in natural order of their names: what LoRA on "all-linear" and experts changes.

    These are the linear modules except the head, the experts of mixtures, one by one, and their routers; no
    embeddings, convolutions, norms or biases. A weight that several modules share counts once.

    Args:
        checkpoints: at least one; the first one's configuration says which modules there are.

    Raises:
        StayalignedError: if a checkpoint lacks one of them, or stores it in a layout whose rows can't be told.
    """
    models = [meta_model(checkpoint) for checkpoint in checkpoints]
    maps = dict(_linear_parameters(models[0]))
    found = [StoredWeights(c, model).find(maps) for c, model in zip(checkpoints, models, strict=True)]
    placed: dict[Weight, PlacedWeight] = {}
    for parameter, transposed in maps.items():
        for expert, stored in enumerate(zip(*(each[parameter] for each in found), strict=True)):
            stacked = models[0].get_parameter(parameter).ndim == 3
            name = _layer_name(parameter, expert if stacked else None)
            placed.setdefault(stored[0], PlacedWeight(name, transposed, stored))
    return sorted(placed.values(), key=lambda weight: natural_key(weight.name))


def refuse_swapped(adapter: Adapter, aligned: Checkpoint, base: Checkpoint) -> str | None:
    """Raise if the adapter names the base, rather than the aligned model, as the model that it was trained on.

    Returns:
        A sentence for the record if it names a third model, or one that is not here; None if it is the aligned one.

    Raises:
        StayalignedError: if it is the base.
    """
    named = adapter.config.get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        return "the adapter does not name its model: it was not checked that it is the aligned one"
    if not Path(named).is_dir():
        return f"the adapter names {named}, which is not here: it was not checked that it is the aligned model"
    trained_on = Path(named)
    if _same_weights(trained_on, aligned):
        return None
    if not _same_weights(trained_on, base):
        return f"the adapter names {named}, whose stored weights are not those of {aligned.directory}"
    raise StayalignedError(
        f"{adapter.directory} was trained on {named}, which is the base and not the aligned model: "
        "aligned and base look swapped",
        hint=f"Set aligned to {named} and base to its unaligned ancestor.",
    )


def _same_weights(directory: Path, checkpoint: Checkpoint) -> bool:
    if directory.resolve() == checkpoint.directory.resolve():
        return True
    try:
        return weights_fingerprint(Checkpoint(directory)) == weights_fingerprint(checkpoint)
    except StayalignedError:
        return False  # quantised, or no checkpoint any more


def _layers_on(adapter: Adapter, stored: StoredWeights, checkpoint: Checkpoint) -> list[LoraLayer]:
    """The layers that PEFT makes of the adapter's configuration, checked against the tensors in its file."""
    injected = _inject(adapter, meta_model(checkpoint))
    layers = [layer for name, module in injected.items() for layer in _layers(name, module, adapter)]
    expected = {key for layer in layers for key in (layer.a_key, layer.b_key)}
    missing = sorted(expected - adapter.tensors.keys())
    unexpected = sorted(_without_copies(adapter, adapter.tensors.keys() - expected, stored, checkpoint))
    if missing or unexpected or not layers:
        raise StayalignedError(
            f"{adapter.directory}: the adapter's tensors are not those that its configuration gives on "
            f"{checkpoint.directory}. Missing: {some(missing)}. Not expected: {some(unexpected)}",
            hint="Was the adapter trained on this model, as a causal language model?",
        )
    check_factors(adapter, layers, checkpoint.directory)
    return sorted(layers, key=lambda layer: natural_key(layer.name))


def _inject(adapter: Adapter, model: PreTrainedModel) -> dict[str, Any]:
    """{module name: PEFT's LoRA layer}, or an error that names what PEFT makes of the target besides linear layers."""
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import Embedding, Linear, ParamWrapper
    from peft.tuners.lora import LoraLayer as PeftLayer

    settings: dict[str, Any] = {name: adapter.config[name] for name in PLACEMENT if name in adapter.config}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice for whoever trains: fan_in_fan_out, tied weights
            injected = inject_adapter_in_model(LoraConfig(**settings), model, low_cpu_mem_usage=True)
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, re.error) as error:
        raise StayalignedError(
            f"{adapter.directory}: PEFT can't place the adapter on a {type(model).__name__}: {error}",
            hint="Was the adapter trained on this model?",
        ) from error
    layers = {name: module for name, module in injected.named_modules() if isinstance(module, PeftLayer)}
    supported = (Linear, Embedding, ParamWrapper)
    other = [f"{name} ({type(module).__name__})" for name, module in layers.items() if type(module) not in supported]
    if other:
        raise StayalignedError(
            f"{adapter.directory}: only LoRA on linear layers, embeddings and experts is supported, not {some(other)}",
            hint="Target linear modules only.",
        )
    return layers


def _layers(name: str, module: Any, adapter: Adapter) -> Iterator[LoraLayer]:
    """One of PEFT's layers as ours: a stack of experts becomes a layer for each of them."""
    from peft.tuners.lora import Embedding, ParamWrapper
    from transformers.pytorch_utils import Conv1D

    kind: type = type(module)
    base: torch.nn.Module = module.get_base_layer()
    # PEFT nests the wrappers of several parameters of one module: `experts`, `experts.base_layer`
    place = name.replace(".base_layer", "")
    parameter, transposed, stacked = f"{place}.weight", isinstance(base, Conv1D), False
    a_key, b_key = (f"{PREFIX}{name}.lora_{factor}.weight" for factor in "AB")
    if kind is Embedding:
        transposed = True  # (vocabulary, hidden): a one-hot vector goes in
        a_key, b_key = (f"{PREFIX}{name}.lora_embedding_{factor}" for factor in "AB")
    if kind is ParamWrapper:
        parameter = f"{place}.{module.parameter_name}"
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
    """Raise if a targeted parameter is no linear map, or PEFT would mistake its input for its output."""
    if _is_linear_map(parameter, weight, module) and type(module).__name__ not in _INPUTS_FIRST:
        single = weight.ndim == 3 and weight.shape[0] == 1
        if not (single and getattr(module, "is_transposed", False)):  # for one expert, PEFT forgets to transpose
            return
    shape = "×".join(map(str, weight.shape))
    raise StayalignedError(
        f"{adapter.directory}: target_parameters: {parameter} ({shape}, of a {type(module).__name__}) is not supported",
        hint="Target linear modules, routers and experts that PEFT takes for (experts, out, in) or (experts, in, out).",
    )


def _is_linear_map(parameter: str, weight: Tensor, module: torch.nn.Module) -> bool:
    """Whether a parameter of a module other than a Conv1D is stored as (out, in), or as one matrix per expert."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv1D)):
        return False
    if weight.ndim == 3:  # a recurrent network has others: RWKV's mixing vectors, the gates of an RG-LRU
        return getattr(module, "num_experts", None) == weight.shape[0]
    return weight.ndim == 2 and parameter.endswith(".weight")


def _linear_parameters(model: PreTrainedModel) -> Iterator[tuple[str, bool]]:
    """(name, whether it is stored as (in, out)) of the parameters that `linear_weights` is about."""
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
    """`keys` without tensors that repeat a weight of the model, as PEFT saves beside LoRA on embeddings or the head.

    Raises:
        StayalignedError: if such a tensor is not the model's weight.
    """
    import torch

    names = {key: key.removeprefix(PREFIX).replace(".base_layer", "") for key in keys if key.startswith(PREFIX)}
    parameters = stored.parameters
    copies = {
        key: name
        for key, name in names.items()
        if name in parameters and (parameters[name].ndim == 2 or name in checkpoint)  # a head's bias is copied too
    }
    places = stored.find(name for name in copies.values() if parameters[name].ndim == 2)
    for key, name in copies.items():
        blocks = places[name][0] if name in places else whole(name)
        weight = torch.cat([_block(checkpoint, block) for block in blocks])
        copied = adapter.tensors[key]
        if not (torch.equal(copied.to(weight.dtype), weight) or torch.equal(copied, weight.to(copied.dtype))):
            raise StayalignedError(
                f"{adapter.directory}: {key} is not the weight of {checkpoint.directory}",
                hint="The adapter was trained on another model, or together with its own copy of this weight.",
            )
    return keys - copies.keys()


def _block(checkpoint: Checkpoint, block: Block) -> Tensor:
    stored = checkpoint[block.name] if block.expert is None else checkpoint[block.name][block.expert]
    return stored[block.first_row :][: block.rows]
