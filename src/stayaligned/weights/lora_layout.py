"""Layers of adapters whose tensor names are enough to place them, without importing transformers or PEFT.

Importing these libraries takes longer than projecting a 1B model. In most adapters each pair of tensors is named after
a module whose weight the checkpoint stores under the same name; this module recognizes them. Every other adapter, and
every error, is left to `hf.placement.layers`, which uses PEFT and transformers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from stayaligned.core.errors import StayalignedError
from stayaligned.weights.adapters import PREFIX, Adapter, LoraLayer
from stayaligned.weights.checkpoints import Checkpoint
from stayaligned.weights.unsupported import list_names, stored_whole

if TYPE_CHECKING:
    from torch import Tensor

PLAIN_MODEL_TYPES = frozenset(
    {
        *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3"),
        *("olmo", "olmo2", "olmo3", "granite", "starcoder2", "stablelm", "cohere", "cohere2", "glm", "glm4"),
        *("smollm3", "helium", "seed_oss", "exaone4", "ernie4_5", "arcee", "nemotron", "ministral3", "falcon", "opt"),
        # mixtures of experts: attention, and adapters from transformers 4, where experts were modules
        *("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "minimax", "gpt_oss"),
    }
)
"""Architectures whose linear modules' weights are stored as (out, in), with the rows that the model uses."""
_HEAD = "lm_head"
_OF_TEXT_MODEL = re.compile(
    r"(?P<prefix>(?:model\.)?(?:(?:language_model|text_model|llm)\.)?(?:model\.)?)(?P<rest>(?:layers|embed_tokens)(?:\..+)?)"
    r"|(?:language_model\.)?(?P<head>lm_head(?:\..+)?)"
)
"""Names of the modules and parameters of a text model, alone or in a model that also reads images."""


def plain_layers(adapter: Adapter, shape_of: Callable[[str], tuple[int, ...] | None]) -> list[LoraLayer] | None:
    """Return the adapter's layers in natural order of their names, if tensor names, shapes and settings determine them.

    Args:
        adapter: an adapter whose settings passed `unsupported.refuse_unsupported`.
        shape_of: returns the shape (out, in) of a layer's weight by the layer's name, None if it is unknown.

    Returns:
        None if a tensor is not an A or B named after a module, or a module's shape is unknown or does not match its
        factors, or `target_modules` does not name the module.
    """
    config = adapter.config
    modules = _modules_with_factors(adapter.tensors)
    try:
        layers = [_layer(module, config, shape_of(module)) for module in sorted(modules, key=natural_key)]
        targeted = all(is_targeted(config, module) for module in modules)
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, re.error):
        return None  # invalid settings: PEFT reports what is wrong
    found = [layer for layer in layers if layer is not None and _has_shapes(layer, adapter)]
    return found if targeted and modules and len(found) == len(modules) else None


def place_by_name(adapter: Adapter, aligned: Checkpoint, base: Checkpoint) -> list[LoraLayer] | None:
    """Return `plain_layers` for two checkpoints that both store each layer's weight as `{layer.name}.weight`.

    Returns:
        None as `plain_layers`, and if an architecture is not in PLAIN_MODEL_TYPES, the adapter has no tensors for a
        weight that its settings target, or it may target a head that is stored under another name.
    """
    if adapter.config.get("layers_to_transform") is not None or adapter.config.get("target_parameters"):
        return None  # left to PEFT
    both = (aligned, base)
    if any(checkpoint.config().get("model_type") not in PLAIN_MODEL_TYPES for checkpoint in both):
        return None
    layers = plain_layers(adapter, lambda module: _common_shape(f"{module}.weight", both))
    if layers is None:
        return None
    weights = {name.removesuffix(".weight") for name in aligned if name.endswith(".weight")}
    targeted = {name for name in weights | {_HEAD} if is_targeted(adapter.config, name)}
    return layers if targeted == {layer.name for layer in layers} else None


def name_among(known: Collection[str], name: str) -> str | None:
    """Return the name that a model gives to a module or parameter of a model with the same text model.

    The class that a model is trained as decides the prefix of its text model: `model.layers.0`,
    `model.language_model.layers.0` and `language_model.model.layers.0` are the same layer.

    Args:
        known: the model's names of modules, or of parameters.
        name: a module or parameter under any of these names.

    Returns:
        `name` itself if it is known; None if none of its names is.
    """
    if name in known:
        return name
    part = _OF_TEXT_MODEL.fullmatch(name)
    if part is None:
        return None
    if part["head"]:
        candidates = [f"{prefix}{part['head']}" for prefix in ("", "language_model.")]
    else:
        matches = (_OF_TEXT_MODEL.fullmatch(each) for each in known)
        prefixes = {match["prefix"] for match in matches if match and (match["rest"] or "").startswith("layers")}
        candidates = [f"{prefix}{part['rest']}" for prefix in sorted(prefixes)]
    found = [each for each in candidates if each in known]
    return found[0] if len(found) == 1 else None


def other_names(adapter: Adapter, known: Collection[str]) -> dict[str, str] | None:
    """Return {module in the adapter's file: the same module of a model}.

    Args:
        adapter: an adapter, which may have been trained on another class with the same text model.
        known: names of the model's modules.

    Returns:
        An empty mapping if all names are the same; None if the model lacks a module under every name.
    """
    plain = {stored: stored.replace(".base_layer", "") for stored in adapter.modules()}
    if all(name in known for name in plain.values()):
        return {}
    names = {stored: name_among(known, name) for stored, name in plain.items()}
    found = {stored: name for stored, name in names.items() if name is not None}
    return found if len(found) == len(names) == len({*found.values()}) else None


def translate(adapter: Adapter, names: Mapping[str, str]) -> Adapter:
    """Return an adapter under other names, whose configuration lists the modules, each with its own rank and alpha.

    Args:
        adapter: the adapter.
        names: {module in its file: other name}, for every module.

    Raises:
        StayalignedError: if the configuration does not target a module that has factors.
    """
    config = adapter.config
    untargeted = sorted(module for module in names if not is_targeted(config, module))
    if untargeted:
        raise StayalignedError(
            f"{adapter.directory}: the adapter's configuration does not match its tensors: {list_names(untargeted)}",
            hint="Give the model that the adapter was trained on.",
        )
    settings: dict[str, Any] = {"target_modules": sorted(names.values())}
    for pattern, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        values = {name: pattern_value(config.get(pattern), old, config.get(default, 8)) for old, name in names.items()}
        settings[pattern] = {f"^{re.escape(name)}": value for name, value in values.items()}
    dropped = ("exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters")
    kept = {name: value for name, value in config.items() if name not in dropped}
    tensors: dict[str, Tensor] = {}
    for key, tensor in adapter.tensors.items():
        module, dot, factor = key.removeprefix(PREFIX).partition(".lora_")
        tensors[f"{PREFIX}{names[module]}{dot}{factor}" if module in names else key] = tensor
    return replace(adapter, config={**kept, **settings}, tensors=tensors)


def under_stored_names(layers: Sequence[LoraLayer], names: Mapping[str, str]) -> list[LoraLayer]:
    """Return the layers of a translated adapter with the names of their tensors in the original's file.

    Args:
        layers: the layers.
        names: what the adapter was translated with; may be empty.
    """
    back = {f"{PREFIX}{name}": f"{PREFIX}{stored}" for stored, name in names.items()}

    def stored_key(layer: LoraLayer, key: str) -> str:
        return back.get(PREFIX + layer.name, PREFIX + layer.name) + key.removeprefix(PREFIX + layer.name)

    if not back:
        return list(layers)
    return [replace(each, a_key=stored_key(each, each.a_key), b_key=stored_key(each, each.b_key)) for each in layers]


def is_targeted(config: Mapping[str, Any], module: str) -> bool:
    """Return whether the settings target a module: a list gives names or their last parts, a string is a regex.

    The contract with PEFT is `peft.tuners.tuners_utils.check_target_module_exists`, without `layers_to_transform`.
    """
    return not _matches(config.get("exclude_modules") or (), module) and _matches(config["target_modules"], module)


def pattern_value(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """Return a module's value in `rank_pattern` or `alpha_pattern`: of the first pattern that matches, or the default.

    The contract with PEFT is `peft.utils.other.get_pattern_key`.
    """
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Return a sort key that compares the parts of a name between dots and brackets, numbers as numbers."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"[.\[\]]", name)]


def _matches(targets: str | Collection[str], module: str) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    return any(module == target or module.endswith(f".{target}") for target in targets)


def _modules_with_factors(keys: Collection[str]) -> set[str]:
    """Return the modules that have both an A and a B; an empty set if a tensor is neither, nor stored whole."""
    factors: dict[str, set[str]] = {"A": set(), "B": set()}
    for key in set(keys).difference(stored_whole(keys)):
        match = re.fullmatch(re.escape(PREFIX) + r"(.+)\.lora_([AB])\.weight", key)
        if match is None or "base_layer" in match[1].split("."):
            return set()
        factors[match[2]].add(match[1])
    return factors["A"] if factors["A"] == factors["B"] else set()


def _layer(module: str, config: Mapping[str, Any], shape: tuple[int, ...] | None) -> LoraLayer | None:
    if shape is None or len(shape) != 2:
        return None
    rank: int = pattern_value(config.get("rank_pattern"), module, config.get("r", 8))
    alpha: float = pattern_value(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
    return LoraLayer(
        name=module,
        parameter=f"{module}.weight",
        a_key=f"{PREFIX}{module}.lora_A.weight",
        b_key=f"{PREFIX}{module}.lora_B.weight",
        rank=rank,
        scaling=alpha / (math.sqrt(rank) if config.get("use_rslora") else rank),
        in_features=shape[1],
        out_features=shape[0],
    )


def _has_shapes(layer: LoraLayer, adapter: Adapter) -> bool:
    shapes = tuple(adapter.tensors[layer.a_key].shape), tuple(adapter.tensors[layer.b_key].shape)
    return shapes == ((layer.rank, layer.in_features), (layer.out_features, layer.rank))


def _common_shape(name: str, checkpoints: tuple[Checkpoint, ...]) -> tuple[int, ...] | None:
    shapes = {checkpoint.shape(name) if name in checkpoint else None for checkpoint in checkpoints}
    return shapes.pop() if len(shapes) == 1 else None
