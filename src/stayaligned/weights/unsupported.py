"""What is refused about adapters and checkpoints, by name and with the way out, whichever way the layers are found."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from stayaligned.core.errors import StayalignedError
from stayaligned.weights.adapters import Adapter, LoraLayer, all_finite
from stayaligned.weights.checkpoints import Checkpoint

PLACEMENT = (
    *("r", "target_modules", "exclude_modules", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"),
    *("fan_in_fan_out", "layers_to_transform", "layers_pattern", "target_parameters"),
)
"""Settings that say where LoRA layers are, and how they scale: PEFT's injection acts on them."""
_WITHOUT_EFFECT = (
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "lora_dropout", "init_lora_weights", "bias"),
    # parts of features that are off, or of inits that leave the base as it is
    *("megatron_core", "qalora_group_size", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
)
"""Settings that don't change ΔW = scaling·BA, given that `refuse_unsupported` has looked at init and bias."""
BASE_PRESERVING_INITS = (True, False, "gaussian", "orthogonal", "eva", "mica")
"""Values of `init_lora_weights` that leave the base weights as they are."""
_WAY_OUT = {
    "use_dora": "Merge it into the model instead (`merge_and_unload`); DoRA's magnitudes are not linear in B and A.",
    "modules_to_save": "Train without modules_to_save; whole modules are not a low-rank update.",
    "trainable_token_indices": "Train without trainable tokens.",
    "lora_bias": "Train with lora_bias=False.",
    "layer_replication": "Replicated layers share one weight; train without layer_replication.",
}


def refuse_unsupported(adapter: Adapter) -> None:
    """Raise unless the update is exactly scaling·BA on an unchanged base, by an allow-list of settings.

    Raises:
        StayalignedError: naming the setting and the way out.
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
    for name in ("r", "lora_alpha"):
        value = config.get(name, 8)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise StayalignedError(
                f"{adapter.directory}: {name}={value!r}, expected a number", hint="Save the adapter again with PEFT."
            )
    for name, value in config.items():
        if value and name not in PLACEMENT and name not in _WITHOUT_EFFECT:
            raise StayalignedError(
                f"{adapter.directory}: {name}={value!r} is not supported",
                hint=_WAY_OUT.get(
                    name, "The setting changes what the adapter computes, or is unknown; train without it."
                ),
            )


def refuse_quantised(checkpoint: Checkpoint) -> None:
    """Raise if the checkpoint's configuration says that its weights are quantised.

    Raises:
        StayalignedError: then.
    """
    if checkpoint.config().get("quantization_config"):
        raise StayalignedError(
            f"{checkpoint.directory}: the checkpoint is quantised", hint="Use it in bf16, fp16 or fp32."
        )


def check_factors(adapter: Adapter, layers: Sequence[LoraLayer], source: Path) -> None:
    """Raise unless every layer's tensors have the shapes that its model asks for, and hold finite numbers.

    Args:
        adapter: whose tensors.
        layers: the adapter's layers; all their tensors are there.
        source: where the shapes come from, for the message: a model's directory, or a subspace file.

    Raises:
        StayalignedError: naming the first tensor that is no factor.
    """
    shapes: dict[str, tuple[int, int]] = {}
    for layer in layers:  # all experts of a stack share two tensors
        shapes[layer.a_key] = (layer.experts * layer.rank, layer.in_features)
        shapes[layer.b_key] = (layer.out_features, layer.experts * layer.rank)
    for key, expected in shapes.items():
        tensor = adapter.tensors[key]
        if tuple(tensor.shape) != expected:
            raise StayalignedError(
                f"{adapter.directory}: {key} is {tuple(tensor.shape)}, but {expected} on {source}",
                hint="The adapter was trained on another model, or saved from one process of a sharded run.",
            )
        floating = tensor.is_floating_point() and tensor.dtype.itemsize > 1
        if not floating or not all_finite(tensor):
            raise StayalignedError(
                f"{adapter.directory}: {key} holds values that are no finite floating-point numbers",
                hint="The training diverged or the file is damaged.",
            )


def some(names: Sequence[str], limit: int = 8) -> str:
    """The first names of a list that may be long, for a message."""
    shown = ", ".join(names[:limit]) or "none"
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
