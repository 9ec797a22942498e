"""Unsupported adapters and checkpoints: errors that name the setting or tensor, and the fix."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from stayaligned.core.errors import StayalignedError
from stayaligned.core.text import one_line
from stayaligned.weights.adapters import PREFIX, Adapter, LoraLayer, all_finite
from stayaligned.weights.checkpoints import Checkpoint

PLACEMENT = (
    *("r", "target_modules", "exclude_modules", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"),
    *("fan_in_fan_out", "layers_to_transform", "layers_pattern", "target_parameters"),
)
"""Settings that determine where LoRA layers are and how they scale: PEFT's injection uses them."""
_WITHOUT_EFFECT = (
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "lora_dropout", "init_lora_weights", "bias"),
    # settings of features that are off, or of inits that don't change the base
    *("megatron_core", "qalora_group_size", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    # settings of training that ms-swift, Unsloth and older versions of PEFT add
    *("lora_dtype", "lorap_lr_ratio", "lorap_emb_lr", "base_model_class", "parent_library", "unsloth_fixed"),
)
"""Settings that don't change ΔW = scaling·BA, given that `refuse_unsupported` has checked init and bias."""
BASE_PRESERVING_INITS = (True, False, "gaussian", "orthogonal", "eva", "mica")
"""Values of `init_lora_weights` that don't change the base weights."""
_STORED_WHOLE = ("modules_to_save", "trainable_token_indices", "ensure_weight_tying")
"""Settings of modules that an adapter stores whole, beside its factors; `refuse_whole` checks which."""
_COPIED_WHOLE = re.compile(r"embed|lm_head|wte|wpe|output_layer|norm|\bln_|trainable_tokens")
"""Found in the names of embeddings, heads and norms."""
_FIXES = {
    "use_dora": "Merge the adapter into the model (`merge_and_unload`); DoRA's magnitudes are not linear in B and A.",
    "lora_bias": "Train with lora_bias=False.",
    "layer_replication": "Train without layer_replication; replicated layers share one weight.",
}


def refuse_unsupported(adapter: Adapter) -> None:
    """Raise unless the adapter's settings are known to give exactly scaling·BA on an unchanged base.

    Raises:
        StayalignedError: naming the first unsupported setting, and the fix.
    """
    config = adapter.config
    init = config.get("init_lora_weights", True)
    if init not in BASE_PRESERVING_INITS:
        raise StayalignedError(
            f"{adapter.directory}: init_lora_weights={init!r} changed the base weights, so BA is not the whole update",
            hint="Convert it: peft_model.save_pretrained(OUT, path_initial_model_for_weight_conversion=INITIAL).",
        )
    if config.get("bias", "none") != "none":
        raise StayalignedError(
            f"{adapter.directory}: bias={config['bias']!r}: trained biases are not a low-rank update",
            hint='Train with bias="none".',
        )
    refuse_settings(adapter.directory, config, known=(*PLACEMENT, *_STORED_WHOLE))
    if config.get("ensure_weight_tying") and any(re.search(r"(embed|head).*\.lora_", key) for key in adapter.tensors):
        raise StayalignedError(
            f"{adapter.directory}: ensure_weight_tying ties the factors of the embedding to those of the head, and a "
            "patch changes each layer by its own",
            hint="Train without the embedding and the head in target_modules.",
        )
    others = [key for key in stored_whole(adapter.tensors) if not _COPIED_WHOLE.search(key)]
    if others:
        raise StayalignedError(
            f"{adapter.directory}: modules stored whole are not low-rank updates: {list_names(others)}",
            hint="Only embeddings, heads and norms may be stored whole: train without the others in modules_to_save.",
        )


def stored_whole(keys: Iterable[str]) -> list[str]:
    """Return the names of tensors in an adapter's file that are whole weights or rows, not factors.

    PEFT stores them for `modules_to_save`, trainable tokens, and a vocabulary that was resized. Copies of the weight
    that a factor pair changes (`base_layer`) are not among them.
    """
    return sorted(key for key in keys if ".lora_" not in key and "base_layer" not in key.split("."))


def note_on_whole(adapter: Adapter, fate: str = "copied unchanged") -> str | None:
    """Return a note for the record if the adapter stores whole weights, which no patch changes or adds."""
    whole = [key.removeprefix(PREFIX) for key in stored_whole(adapter.tensors)]
    return f"stored whole in the adapter and {fate}: {list_names(whole)}" if whole else None


def refuse_settings(directory: Path, config: Mapping[str, Any], *, known: Collection[str]) -> None:
    """Raise if a configuration has a setting that is not known, is on, and may change what the adapter computes.

    PEFT only warns about settings of other versions and programs, and ignores them.

    Args:
        directory: the adapter's directory, for the message.
        config: its configuration.
        known: the settings that the caller acts on.
    """
    for name, value in config.items():
        if value and name not in known and name not in _WITHOUT_EFFECT:
            raise StayalignedError(
                f"{directory}: {one_line(f'{name}={value!r}')} is not supported",
                hint=_FIXES.get(
                    name, "Train without it: the setting is unknown, or changes what the adapter computes."
                ),
            )


def refuse_quantized(checkpoint: Checkpoint) -> None:
    """Raise if the checkpoint's weights are quantized according to its configuration.

    Raises:
        StayalignedError: if they are.
    """
    config = checkpoint.config()
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]  # text_config of composite models
    if any(
        part.get(name) for part in parts for name in ("quantization_config", "quantization")
    ):  # MLX writes the second
        raise StayalignedError(
            f"{checkpoint.directory}: the checkpoint is quantized", hint="Use the same model in bf16, fp16 or fp32."
        )


def check_factors(adapter: Adapter, layers: Sequence[LoraLayer], source: Path) -> None:
    """Raise unless every layer's tensors have the expected shapes and finite values.

    Args:
        adapter: the adapter.
        layers: the adapter's layers, whose tensors all exist.
        source: the model directory or subspace file that gives the shapes, for the message.

    Raises:
        StayalignedError: naming the first wrong tensor.
    """
    shapes: dict[str, tuple[int, int]] = {}
    for layer in layers:  # the experts of a stack share two tensors
        shapes[layer.a_key] = (layer.experts * layer.rank, layer.in_features)
        shapes[layer.b_key] = (layer.out_features, layer.experts * layer.rank)
    for key, expected in shapes.items():
        tensor = adapter.tensors[key]
        if tuple(tensor.shape) != expected:
            raise StayalignedError(
                f"{adapter.directory}: {key} has the shape {tuple(tensor.shape)}, but {source} expects {expected}",
                hint="Use the model that the adapter was trained on; or save the adapter again if it was saved by one "
                "process of a sharded run.",
            )
        if not tensor.is_floating_point() or tensor.dtype.itemsize == 1:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise StayalignedError(
                f"{adapter.directory}: {key} is stored as {kind}, expected float32, bfloat16 or float16",
                hint="Save the adapter again in one of these types.",
            )
        if not all_finite(tensor):
            raise StayalignedError(
                f"{adapter.directory}: {key} holds NaN or infinity",
                hint="Train or download the adapter again: training diverged, or the file is damaged.",
            )


def list_names(names: Sequence[str], limit: int = 8) -> str:
    """Join the first names of a list for a message, with the number of the others."""
    shown = ", ".join(names[:limit]) or "none"
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
