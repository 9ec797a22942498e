"""Which weights an adapter changes: the layer map, from PEFT's own injection into a model without weights.

Names, ranks and scalings come from PEFT itself, and the names on disk from transformers' own loading rules, so that
rank patterns, regular expressions, renamed checkpoints and tied weights mean here what they mean there. What the maths
of `projection` does not cover exactly is refused by name.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stayaligned.adapters import Adapter, LoraLayer
from stayaligned.checkpoints import Checkpoint
from stayaligned.errors import StayalignedError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PREFIX = "base_model.model."
_PLACEMENT = (
    *("r", "target_modules", "exclude_modules", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"),
    *("fan_in_fan_out", "layers_to_transform", "layers_pattern"),
)
"""Settings that say where LoRA layers are, and how they scale: PEFT's injection acts on them."""
_WITHOUT_EFFECT = (
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "lora_dropout", "init_lora_weights", "bias"),
    # parts of features that are off, or of inits that leave the base as it is
    *("megatron_core", "qalora_group_size", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
)
"""Settings that don't change ΔW = scaling·BA, given that `refuse_unsupported` has looked at init and bias."""
_BASE_PRESERVING_INITS = (True, False, "gaussian", "orthogonal", "eva", "mica")
_WAY_OUT = {
    "use_dora": "Merge it into the model instead (`merge_and_unload`); DoRA's magnitudes are not linear in B and A.",
    "modules_to_save": "Train without modules_to_save; whole modules are not a low-rank update.",
    "target_parameters": "Mixture-of-experts parameters are not supported; target linear modules only.",
    "trainable_token_indices": "Train without trainable tokens.",
    "lora_bias": "Train with lora_bias=False.",
    "layer_replication": "Replicated layers share one weight; train without layer_replication.",
}


def lora_layers(adapter: Adapter, checkpoint: Checkpoint) -> list[LoraLayer]:
    """The adapter's LoRA layers in the model's order, checked tensor by tensor against the adapter's file.

    Args:
        adapter: the adapter as read from disk.
        checkpoint: the model that it was trained on.

    Raises:
        StayalignedError: if the adapter uses what is not supported, or does not fit the model.
    """
    refuse_unsupported(adapter)
    injected = _inject(adapter, meta_model(checkpoint))
    layers = [_layer(name, module, adapter) for name, module in injected.items()]
    expected = {key for layer in layers for key in (layer.a_key, layer.b_key)}
    missing = sorted(expected - adapter.tensors.keys())
    unexpected = sorted(adapter.tensors.keys() - expected - _base_copies(adapter, checkpoint, layers))
    if missing or unexpected or not layers:
        raise StayalignedError(
            f"{adapter.directory}: the adapter's tensors are not those that its configuration gives on "
            f"{checkpoint.directory}. Missing: {_some(missing)}. Not expected: {_some(unexpected)}",
            hint="Was the adapter trained on this model, as a causal language model?",
        )
    for layer in layers:
        _check_tensors(layer, adapter, checkpoint)
    return layers


def weight_names(checkpoint: Checkpoint, layers: Sequence[LoraLayer]) -> dict[str, str]:
    """{layer name: name of its weight in the checkpoint's files}, by transformers' loading rules and weight ties.

    Raises:
        StayalignedError: listing the layers whose weight is missing, or is put together from several tensors.
    """
    model = meta_model(checkpoint)
    stored = _stored_names(checkpoint, model)
    tied: Mapping[str, str] = model.all_tied_weights_keys
    names: dict[str, str] = {}
    missing: list[str] = []
    converted: list[str] = []
    for layer in layers:
        weight = f"{layer.name}.weight"
        sources = stored.get(weight) or stored.get(tied.get(weight, ""))
        if not sources:
            missing.append(weight)
        elif sources == [None] or len(sources) > 1:
            converted.append(weight)
        else:
            names[layer.name] = str(sources[0])
    if missing or converted:
        raise StayalignedError(
            f"{checkpoint.directory}: weights of the adapter's layers can't be read. Missing: {_some(missing)}. "
            f"Stored in another layout: {_some(converted)}",
            hint="Is this the model that the adapter was trained on, or its ancestor? Fused or split weights "
            "(mixtures of experts, for one) are not supported.",
        )
    return names


def refuse_unsupported(adapter: Adapter) -> None:
    """Raise unless the update is exactly scaling·BA on an unchanged base, by an allow-list of settings.

    Raises:
        StayalignedError: naming the setting and the way out.
    """
    config = adapter.config
    init = config.get("init_lora_weights", True)
    if init not in _BASE_PRESERVING_INITS:
        raise StayalignedError(
            f"{adapter.directory}: init_lora_weights={init!r} changed the base weights, so BA is not the whole update",
            hint="Convert it: peft_model.save_pretrained(OUT, path_initial_model_for_weight_conversion=INITIAL).",
        )
    if config.get("bias", "none") != "none":
        raise StayalignedError(
            f"{adapter.directory}: bias={config['bias']!r}: trained biases are not a low-rank update",
            hint='Train with bias="none".',
        )
    for name, value in config.items():
        if value and name not in _PLACEMENT and name not in _WITHOUT_EFFECT:
            raise StayalignedError(
                f"{adapter.directory}: {name}={value!r} is not supported",
                hint=_WAY_OUT.get(
                    name, "The setting changes what the adapter computes, or is unknown; train without it."
                ),
            )
    embedded = sorted(key for key in adapter.tensors if "lora_embedding_" in key)
    if embedded:
        raise StayalignedError(
            f"{adapter.directory}: LoRA on an embedding is not supported: {_some(embedded)}",
            hint="Target linear modules only.",
        )


def meta_model(checkpoint: Checkpoint) -> PreTrainedModel:
    """The checkpoint's causal language model on the meta device: every module, no weights.

    Raises:
        StayalignedError: if the configuration is unknown, quantised, or needs code from the checkpoint.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    stored = checkpoint.config()
    if stored.get("quantization_config"):
        raise StayalignedError(
            f"{checkpoint.directory}: the checkpoint is quantised", hint="Use it in bf16, fp16 or fp32."
        )
    try:
        config = AutoConfig.from_pretrained(checkpoint.directory, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        raise StayalignedError(
            f"{checkpoint.directory}: no causal language model of transformers ({stored.get('model_type')!r}): {error}",
            hint="Models with code of their own are not loaded.",
        ) from error


def _inject(adapter: Adapter, model: PreTrainedModel) -> dict[str, Any]:
    """{module name: PEFT's LoRA layer}, or an error that names what PEFT makes of the target besides linear layers."""
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import Linear
    from peft.tuners.lora import LoraLayer as PeftLayer

    settings: dict[str, Any] = {name: adapter.config[name] for name in _PLACEMENT if name in adapter.config}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice for whoever trains: fan_in_fan_out, tied weights
            injected = inject_adapter_in_model(LoraConfig(**settings), model, low_cpu_mem_usage=True)
    except (ValueError, TypeError, KeyError) as error:
        raise StayalignedError(
            f"{adapter.directory}: PEFT can't place the adapter on a {type(model).__name__}: {error}",
            hint="Was the adapter trained on this model?",
        ) from error
    layers = {name: module for name, module in injected.named_modules() if isinstance(module, PeftLayer)}
    other = [f"{name} ({type(module).__name__})" for name, module in layers.items() if type(module) is not Linear]
    if other:
        raise StayalignedError(
            f"{adapter.directory}: only LoRA on linear layers is supported, not {_some(other)}",
            hint="Target linear modules only.",
        )
    return layers


def _layer(name: str, module: Any, adapter: Adapter) -> LoraLayer:
    from transformers.pytorch_utils import Conv1D

    return LoraLayer(
        name=name,
        a_key=f"{_PREFIX}{name}.lora_A.weight",
        b_key=f"{_PREFIX}{name}.lora_B.weight",
        rank=module.r["default"],
        scaling=module.scaling["default"],
        in_features=module.in_features,
        out_features=module.out_features,
        transposed=isinstance(module.get_base_layer(), Conv1D),
    )


def _base_copies(adapter: Adapter, checkpoint: Checkpoint, layers: Sequence[LoraLayer]) -> set[str]:
    """Tensors of the adapter's file that repeat a weight of the model, as PEFT saves beside a LoRA on lm_head."""
    import torch

    copied = {key: layer for layer in layers if (key := f"{_PREFIX}{layer.name}.base_layer.weight") in adapter.tensors}
    names = weight_names(checkpoint, list(copied.values())) if copied else {}
    for key, layer in copied.items():
        stored = checkpoint[names[layer.name]]
        if not torch.equal(adapter.tensors[key].to(stored.dtype), stored):
            raise StayalignedError(
                f"{adapter.directory}: {key} is not the weight of {checkpoint.directory}",
                hint="The adapter was trained on another model, or together with its own copy of this weight.",
            )
    return set(copied)


def _check_tensors(layer: LoraLayer, adapter: Adapter, checkpoint: Checkpoint) -> None:
    for key, expected in (
        (layer.a_key, (layer.rank, layer.in_features)),
        (layer.b_key, (layer.out_features, layer.rank)),
    ):
        tensor = adapter.tensors[key]
        if tuple(tensor.shape) != expected:
            raise StayalignedError(
                f"{adapter.directory}: {key} is {tuple(tensor.shape)}, but {expected} on {checkpoint.directory}",
                hint="The adapter was trained on another model, or saved from one process of a sharded run.",
            )
        if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            raise StayalignedError(
                f"{adapter.directory}: {key} holds values that are no finite floating-point numbers",
                hint="The training diverged or the file is damaged.",
            )


def _stored_names(checkpoint: Checkpoint, model: PreTrainedModel) -> dict[str, list[str | None]]:
    """{parameter of the model: the names that it is stored under}; None stands for a converted tensor.

    Follows `transformers.core_model_loading.convert_and_load_state_dict_in_model`, without the tensors.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    parameters = model.state_dict()
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    stored: dict[str, list[str | None]] = {}
    for key in sorted(checkpoint, key=dot_natural_key):
        renamed, converter = rename_source_key(key, renamings, converters, model.base_model_prefix, parameters)
        if renamed not in parameters and key in parameters:
            renamed, converter = rename_source_key(key, [], [], model.base_model_prefix, parameters)
        stored.setdefault(renamed, []).append(key if converter is None else None)
    return stored


def refuse_swapped(adapter: Adapter, aligned: Checkpoint, base: Checkpoint) -> None:
    """Raise if the adapter names the base, rather than the aligned model, as the model that it was trained on.

    Raises:
        StayalignedError: then.
    """
    named = adapter.config.get("base_model_name_or_path")
    if not isinstance(named, str) or not Path(named).is_dir():
        return
    trained_on = Path(named)
    if _same_weights(trained_on, aligned.directory) or not _same_weights(trained_on, base.directory):
        return
    raise StayalignedError(
        f"{adapter.directory} was trained on {named}, which is the base and not the aligned model: "
        "aligned and base look swapped",
        hint=f"Set aligned to {named} and base to its unaligned ancestor.",
    )


def _same_weights(x: Path, y: Path) -> bool:
    from stayaligned.files import fingerprint

    if x.resolve() == y.resolve():
        return True
    files = [sorted(path.glob("*.safetensors")) for path in (x, y)]
    sizes = [[(file.name, file.stat().st_size) for file in each] for each in files]
    if not sizes[0] or sizes[0] != sizes[1]:
        return False
    return all(fingerprint(a) == fingerprint(b) for a, b in zip(*files, strict=True))


def _some(names: Sequence[str], limit: int = 8) -> str:
    shown = ", ".join(names[:limit]) or "none"
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
