"""Checkpoints and adapters as transformers and PEFT objects: safetensors only, no code from the checkpoint."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stayaligned.core.errors import StayalignedError, did_you_mean
from stayaligned.hf.targets import ALL_LINEAR, excluding, linear_names, unfit_names

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_log = logging.getLogger(__name__)

_ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_WEIGHTS = "adapter_model.safetensors"


def load_model(ref: str | Path, *, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A causal language model on the CPU, in evaluation mode; a Trainer places it where it trains.

    Args:
        ref: a checkpoint directory or a hub id.
        dtype: the weights' type; as stored if not given.

    Raises:
        StayalignedError: if there is no such checkpoint, or it is not one that can be loaded safely.
    """
    from transformers import AutoModelForCausalLM

    _require_checkpoint(ref)
    model = _whole(AutoModelForCausalLM, ref, dtype="auto" if dtype is None else dtype)
    config = model.config
    if getattr(config, "rescale_every", 0):
        # RWKV divides some weights by two whenever it is evaluated, against overflow in fp16: an adapter would then
        # count double beside them, and a checkpoint or an anchor hold them halved.
        config.rescale_every = 0
    if config.model_type == "xlstm" and config.mode != "inference":
        raise StayalignedError(
            f"{ref}: mode={config.mode!r} takes only lengths that are multiples of chunk_size, and can't answer",
            hint='Set "mode": "inference" in its config.json: it computes the same, and trains too.',
        )
    return model


def load_tokenizer(ref: str | Path, *, chat_template: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint that can hold a conversation.

    Args:
        ref: a checkpoint directory or a hub id.
        chat_template: takes the place of the tokenizer's own, or of none.

    Raises:
        StayalignedError: if there is no tokenizer, or it has no chat template and none is given.
    """
    from transformers import AutoTokenizer

    _require_checkpoint(ref)
    tokenizer: PreTrainedTokenizerBase = _loaded(AutoTokenizer, ref, "tokenizer")
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    if not tokenizer.chat_template:
        raise StayalignedError(
            f"{ref}: the tokenizer has no chat template, so there is no telling how a request is put to the model",
            hint="Use the instruction-tuned model, or put its chat_template.jinja beside tokenizer_config.json. "
            "A base model gets one by `stayaligned align`: --chat-template FILE.",
        )
    return tokenizer


def load_finetuned(
    ref: str | Path, adapter: Path | None, *, dtype: torch.dtype | None = None, trainable: bool = False
) -> PreTrainedModel | PeftModel:
    """A model with its adapter, unmerged, for answering prompts: on the accelerator if there is one.

    Unmerged, because merging into fp16 or bf16 weights rounds a small update away in part (see `merge_adapter`).

    Args:
        ref: a checkpoint directory or a hub id.
        adapter: a PEFT adapter on it; None for the model alone.
        dtype: the model's type; as stored if not given.
        trainable: whether the adapter's weights require gradients.

    Raises:
        StayalignedError: if either is missing, or the adapter was made for another architecture.
    """
    model = load_model(ref, dtype=dtype)
    return _placed(model if adapter is None else _with_adapter(model, adapter, trainable))


def merge_adapter(ref: str | Path, adapter: Path) -> PreTrainedModel:
    """W + scaling·BA for every weight that an adapter changes, on the CPU, in the types of the checkpoint.

    The sum is made in fp32, on the weights as they are stored, and rounded once. (PEFT's merge into bf16 rounds the
    factors of embeddings and of experts too.) It needs the whole model in fp32 in main memory.

    Raises:
        StayalignedError: if either is missing, they don't fit together, or a sum overflows the stored type.
    """
    import torch

    model = load_model(ref)
    types = weight_types(model)
    cast_weights_(model, torch.float32)
    merged: Any = _with_adapter(model, adapter).merge_and_unload()
    cast_weights_(merged, types)
    return merged


def weight_types(model: PreTrainedModel) -> dict[str, torch.dtype]:
    """{name: type} of every weight."""
    return {name: parameter.dtype for name, parameter in model.named_parameters()}


def cast_weights_(model: PreTrainedModel, types: torch.dtype | Mapping[str, torch.dtype]) -> None:
    """Give every weight a type, one for all or each its own; buffers (rotary frequencies) keep theirs.

    Raises:
        StayalignedError: if a weight overflows its new type.
    """
    for name, parameter in model.named_parameters():
        dtype = types[name] if isinstance(types, Mapping) else types
        if parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)
            if not bool(parameter.data.isfinite().all()):
                raise StayalignedError(
                    f"{name}: the weight overflows {dtype}",
                    hint="Save the base model in bf16 or fp32, and start there.",
                )


def load_classifier(ref: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A sequence classifier and its tokenizer, for a judge: on the accelerator if there is one.

    Raises:
        StayalignedError: if there is no such checkpoint, or it holds no trained classification head.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    _require_checkpoint(ref)
    tokenizer: PreTrainedTokenizerBase = _loaded(AutoTokenizer, ref, "tokenizer")
    return _placed(_whole(AutoModelForSequenceClassification, ref, dtype="auto")), tokenizer


def load_guard(ref: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model that judges, and its tokenizer: on the accelerator if there is one.

    Raises:
        StayalignedError: if there is no such checkpoint, or it is not one that can be loaded safely.
    """
    from transformers import AutoTokenizer

    _require_checkpoint(ref)
    tokenizer: PreTrainedTokenizerBase = _loaded(AutoTokenizer, ref, "tokenizer")
    return _placed(load_model(ref)), tokenizer


def context_length(config: Any, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return how many tokens a model can read at once."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", tokenizer.model_max_length)
    return min(positions, tokenizer.model_max_length)


def attach_lora(model: PreTrainedModel, lora: Mapping[str, Any]) -> PeftModel:
    """Add a fresh LoRA adapter; only its weights are trainable.

    Args:
        model: changed in place, as PEFT does; use the returned object.
        lora: fields of PEFT's LoraConfig. `task_type` is CAUSAL_LM unless given. `target_modules: all-linear` leaves
            out the modules that LoRA can't work on (`targets.unfit_names`): it names them in a warning, and the
            adapter's settings name them as `exclude_modules`.

    Raises:
        StayalignedError: if a field is unknown or has an impossible value, no module of the model is a target, or a
            module that is named as one can't be one.
    """
    from dataclasses import fields

    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import Linear as LoraLinear

    known = sorted(field.name for field in fields(LoraConfig) if field.init)
    for name in lora:
        if name not in known:
            raise StayalignedError(f"lora.{name}: no such LoRA setting", hint=did_you_mean(name, known, "settings"))
    settings: dict[str, Any] = {"task_type": "CAUSAL_LM", **lora}
    unfit = unfit_names(model)
    fit = [name for name in linear_names(model) if name not in unfit]
    possible = f"Possible on this model: {', '.join(fit)}; `target_modules: {ALL_LINEAR}` takes all but the head."
    if unfit and str(settings.get("target_modules")).lower() == ALL_LINEAR:
        settings["exclude_modules"] = excluding(settings.get("exclude_modules"), sorted(unfit))
        left_out = ", ".join(f"{name} ({why})" for name, why in unfit.items())
        _log.warning("lora.target_modules: all-linear leaves out %s", left_out)
    try:
        with warnings.catch_warnings():
            for pattern in {"rank_pattern", "alpha_pattern"} - settings.keys():
                # PEFT's own, with which it doubles the rank of experts; it then warns that no module has it.
                warnings.filterwarnings("ignore", message=f"The following {pattern} keys")
            adapted: Any = get_peft_model(model, LoraConfig(**settings))
    except (ValueError, TypeError) as error:
        raise StayalignedError(f"lora: {' '.join(str(error).split())}", hint=possible) from None
    for name, module in adapted.named_modules():
        last = name.rpartition(".")[2]
        if isinstance(module, LoraLinear) and last in unfit:
            raise StayalignedError(f"lora.target_modules: {last} would never learn: {unfit[last]}", hint=possible)
    return adapted


def _with_adapter(model: PreTrainedModel, adapter: Path, trainable: bool = False) -> PeftModel:
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    if not (adapter / _ADAPTER_CONFIG).is_file() or not (adapter / _ADAPTER_WEIGHTS).is_file():
        raise StayalignedError(
            f"{adapter}: not a PEFT adapter in safetensors form",
            hint=f"The directory must hold {_ADAPTER_CONFIG} and {_ADAPTER_WEIGHTS}.",
        )
    hint = "Name the model that the adapter was trained on."
    try:
        with warnings.catch_warnings():
            # PEFT only warns of layers that the file lacks, and leaves them as if untrained.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            warnings.filterwarnings("ignore", message=r"The following (rank|alpha)_pattern keys")
            adapted = PeftModel.from_pretrained(model, str(adapter), is_trainable=trainable)
    except (ValueError, RuntimeError, KeyError, TypeError, UserWarning) as error:
        raise StayalignedError(f"{adapter}: the adapter does not fit the model: {_short(error)}", hint=hint) from None
    # Layers that the model lacks, it drops without a word.
    with safe_open(adapter / _ADAPTER_WEIGHTS, framework="pt") as file:
        dropped = {name for name in file.keys() if "lora_" in name} - {  # noqa: SIM118 (not a mapping)
            *get_peft_model_state_dict(adapted, save_embedding_layers=False)
        }
    if dropped:
        raise StayalignedError(
            f"{adapter}: the adapter does not fit the model, which lacks {len(dropped)} of its weights, "
            f"{min(dropped)} among them",
            hint=hint,
        )
    return adapted


def _require_checkpoint(ref: str | Path) -> None:
    """Refuse what is meant as a directory but is none, before it is looked up on the hub under that name."""
    path = Path(ref).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            adapter = (path / _ADAPTER_CONFIG).is_file()
            raise StayalignedError(
                f"{path}: not a model checkpoint: it has no config.json",
                hint="That is an adapter: name it as `adapter:`." if adapter else "Name the checkpoint's directory.",
            )
        return
    text = str(ref)
    hub_id = text.count("/") <= 1 and not text.startswith((".", "~", "/")) and not path.exists()
    if not hub_id:
        raise StayalignedError(f"{path}: no such directory", hint="Give a checkpoint directory or a hub id.")


def _placed(model: Any) -> Any:
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return model.to(accelerator).eval() if accelerator is not None else model.eval()


def _whole(loader: Any, ref: str | Path, **options: Any) -> Any:
    """A model all of whose weights are in the checkpoint; transformers would make up the others with a log line."""
    model, found = _loaded(loader, ref, "model", use_safetensors=True, output_loading_info=True, **options)
    missing = sorted(found["missing_keys"])
    if missing:
        raise StayalignedError(
            f"{ref}: lacks {len(missing)} weights of a {type(model).__name__}, {missing[0]} among them",
            hint="The checkpoint is incomplete, or of another kind than is needed here.",
        )
    return model.eval()


def _loaded(loader: Any, ref: str | Path, what: str, **options: Any) -> Any:
    """`loader.from_pretrained`, with the ways in which a checkpoint can be unfit said in one sentence."""
    from huggingface_hub.errors import StrictDataclassError

    path = Path(ref).expanduser()
    local = path.is_dir()
    try:
        return loader.from_pretrained(str(path) if local else str(ref), trust_remote_code=False, **options)
    except StrictDataclassError as error:
        raise StayalignedError(
            f"{ref}: can't load the {what}: config.json: {_short(error)}",
            hint="Set that field to a value that is possible here (a kernel that is installed, for instance).",
        ) from None
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        from huggingface_hub.constants import HF_HUB_OFFLINE

        text = str(error)
        if "trust_remote_code" in text:
            hint = "It needs code from its own repository, which is not run here; use a supported architecture."
        elif local:
            hint = f"The directory must hold a whole checkpoint: {_PARTS[what]}."
        elif HF_HUB_OFFLINE:
            hint = "HF_HUB_OFFLINE is set and the hub cache lacks it: unset it, or give a checkpoint directory."
        else:
            hint = "Check the name, the network, and your access: `hf auth login` for gated models."
        raise StayalignedError(f"{ref}: can't load the {what}: {_short(error)}", hint=hint) from None


_PARTS = {
    "model": "config.json and model.safetensors (pickled .bin weights are not read)",
    "tokenizer": "config.json and tokenizer.json (or the tokenizer's own vocabulary files)",
}


def _short(error: BaseException) -> str:
    """An error's text on one line, as far as a reader will read."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}…"
