"""Loading of checkpoints and adapters with transformers and PEFT: safetensors only, no code from the checkpoint."""

from __future__ import annotations

import contextlib
import logging
import re
import tempfile
import warnings
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stayaligned.core.errors import StayalignedError, did_you_mean
from stayaligned.core.files import refuse_unwritable_hub_cache
from stayaligned.core.settings import ChatTemplate
from stayaligned.core.text import one_line
from stayaligned.hf.hosts import tied_weights
from stayaligned.hf.hub import require_hub_model
from stayaligned.hf.placement.layers import translate_adapter
from stayaligned.hf.placement.stored import language_model_classes
from stayaligned.hf.rendering import use_settings
from stayaligned.hf.targets import ALL_LINEAR, excluding, linear_names, unfit_names
from stayaligned.weights.adapter_config import read_adapter_config, refuse_slow_patterns
from stayaligned.weights.adapters import PREFIX, all_finite, read_adapter, write_adapter
from stayaligned.weights.directories import (
    ADAPTER_WEIGHTS,
    refuse_adapter_files,
    refuse_unless_adapter,
    refuse_unless_model,
    refuse_without_weights,
)
from stayaligned.weights.origin import is_named_model
from stayaligned.weights.unsupported import refuse_settings

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_log = logging.getLogger(__name__)


def load_model(ref: str | Path, *, dtype: torch.dtype | None = None, adapter: Path | None = None) -> PreTrainedModel:
    """Return a causal language model on the CPU, in evaluation mode; a Trainer moves it to its device.

    Args:
        ref: a checkpoint directory or a hub id.
        dtype: type of the weights; by default as stored.
        adapter: an adapter that will be added, for checkpoints that transformers loads as a text model or as one that
            also reads images: the class that the adapter was trained on is loaded.

    Raises:
        StayalignedError: if there is no such checkpoint, or it can't be loaded safely.
    """
    from transformers import AutoConfig

    _require_checkpoint(ref)
    config = _load_pretrained(AutoConfig, ref, "model")
    loaders = language_model_classes(config)
    loader = loaders[0] if adapter is None or len(loaders) == 1 else _trained_class(adapter, loaders, config)
    model = _load_complete(loader, ref, dtype="auto" if dtype is None else dtype)
    config = model.config
    if getattr(config, "rescale_every", 0):
        # RWKV divides some weights by two in evaluation mode, against overflow in fp16: the update of an adapter would
        # then be twice as large beside them, and a checkpoint or an anchor would contain the halved weights.
        config.rescale_every = 0
    if config.model_type == "xlstm" and config.mode != "inference":
        raise StayalignedError(
            f"{ref}: mode={config.mode!r} supports only lengths that are multiples of chunk_size, and can't generate",
            hint='Set "mode": "inference" in its config.json: it computes the same result, also in training.',
        )
    return model


def load_tokenizer(ref: str | Path, settings: ChatTemplate | None = None) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a checkpoint, with a chat template that shows the model the request and the answer.

    Args:
        ref: a checkpoint directory or a hub id.
        settings: file, arguments and date of the chat template; by default the tokenizer's own and a fixed date.

    Raises:
        StayalignedError: if there is no tokenizer, it has no chat template and none is given, or as
            `stayaligned.hf.rendering.use_settings`.
    """
    settings = settings or ChatTemplate()
    tokenizer = _load_tokenizer(ref)
    if not tokenizer.chat_template and settings.file is None:
        raise StayalignedError(
            f"{ref}: the tokenizer has no chat template, which turns a conversation into the model's input",
            hint="Use the instruction-tuned model, or put its chat_template.jinja beside tokenizer_config.json. "
            "`stayaligned align --chat-template FILE` adds one to a base model.",
        )
    use_settings(tokenizer, settings)
    return tokenizer


def load_finetuned(
    ref: str | Path, adapter: Path | None, *, dtype: torch.dtype | None = None, trainable: bool = False
) -> PreTrainedModel | PeftModel:
    """Return a model with its adapter for generation, on the accelerator if there is one.

    The adapter is not merged, because rounding to fp16 or bf16 would lose part of a small update (see
    `merge_adapter`).

    Args:
        ref: a checkpoint directory or a hub id.
        adapter: a PEFT adapter of the model; None for the model alone.
        dtype: type of the model; by default as stored.
        trainable: whether the adapter's weights require gradients.

    Raises:
        StayalignedError: if either is missing, or the adapter does not fit the model.
    """
    model = load_model(ref, dtype=dtype, adapter=adapter)
    finetuned = _move_to_accelerator(model if adapter is None else _with_adapter(model, ref, adapter, trainable))
    for name, weight in finetuned.named_parameters():
        if weight.is_floating_point() and weight.dtype.itemsize > 1 and not all_finite(weight.detach()):
            raise StayalignedError(
                f"{ref}: {name} holds NaN or infinity",
                hint="Train or download the model again: training diverged, or the file is damaged.",
            )
    return finetuned


def merge_adapter(ref: str | Path, adapter: Path) -> PreTrainedModel:
    """Return a model with an adapter merged, W + scaling·BA, on the CPU and in the types of the checkpoint.

    The sum is computed in fp32 from the stored weights, and rounded once. (PEFT's merge into bf16 also rounds the
    factors of embeddings and experts.) The whole model in fp32 must fit into main memory.

    Raises:
        StayalignedError: if either is missing, the adapter does not fit the model, or a sum overflows the stored type.
    """
    import torch

    model = load_model(ref, adapter=adapter)
    types = weight_types(model)
    cast_weights_(model, torch.float32)
    types |= {tied: types[source] for tied, source in tied_weights(model).items() if source in types}
    adapted = _with_adapter(model, ref, adapter)
    _untie_changed(model)
    merged: Any = adapted.merge_and_unload()
    cast_weights_(merged, types)
    return merged


def _untie_changed(model: PreTrainedModel) -> None:
    """Give the head its own weight if it shares the embedding's and a LoRA changes one of them.

    A LoRA changes one of the two as it computes; merged into the shared weight it would change both.
    """
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    if head is None or embedding.weight is not head.weight:
        return
    if isinstance(embedding, BaseTunerLayer) or isinstance(head, BaseTunerLayer):
        inner: Any = head.get_base_layer() if isinstance(head, BaseTunerLayer) else head
        inner.weight = torch.nn.Parameter(inner.weight.detach().clone(), requires_grad=False)


def weight_types(model: PreTrainedModel) -> dict[str, torch.dtype]:
    """Return the type of every weight, by name."""
    return {name: parameter.dtype for name, parameter in model.named_parameters()}


def cast_weights_(model: PreTrainedModel, types: torch.dtype | Mapping[str, torch.dtype]) -> None:
    """Convert every weight to one type, or to its own type by name; buffers (rotary frequencies) do not change.

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
                    hint="Save the base model in bf16 or fp32, and use that checkpoint.",
                )


def load_classifier(ref: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a sequence classifier and its tokenizer for a judge, on the accelerator if there is one.

    Raises:
        StayalignedError: if there is no such checkpoint, or it has no trained classification head.
    """
    from transformers import AutoModelForSequenceClassification

    tokenizer = _load_tokenizer(ref)
    return _move_to_accelerator(_load_complete(AutoModelForSequenceClassification, ref, dtype="auto")), tokenizer


def load_guard(ref: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a causal language model that judges, and its tokenizer, on the accelerator if there is one.

    Raises:
        StayalignedError: if there is no such checkpoint, or it can't be loaded safely.
    """
    tokenizer = _load_tokenizer(ref)
    return _move_to_accelerator(load_model(ref)), tokenizer


def context_length(config: Any, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return how many tokens a model can read at once."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", tokenizer.model_max_length)
    return min(positions, tokenizer.model_max_length)


def attach_lora(model: PreTrainedModel, lora: Mapping[str, Any]) -> PeftModel:
    """Add a new LoRA adapter to a model; only its weights are trainable.

    Args:
        model: the model, which PEFT changes in place; use the returned object.
        lora: fields of PEFT's LoraConfig. The default of `task_type` is CAUSAL_LM. `target_modules: all-linear` skips
            the modules that LoRA can't adapt (`targets.unfit_names`): a warning lists them, and the adapter's
            configuration has them in `exclude_modules`.

    Raises:
        StayalignedError: if a field is unknown or has an invalid value, no module of the model is a target, or a target
            can't be adapted.
    """
    from dataclasses import fields

    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import Linear as LoraLinear

    known = sorted(field.name for field in fields(LoraConfig) if field.init)
    for name in lora:
        if name not in known:
            raise StayalignedError(f"lora.{name}: unknown LoRA setting", hint=did_you_mean(name, known, "settings"))
    settings: dict[str, Any] = {"task_type": "CAUSAL_LM", **lora}
    unfit = unfit_names(model)
    fit = [name for name in linear_names(model) if name not in unfit]
    possible = f"Possible targets: {', '.join(fit)}; `target_modules: {ALL_LINEAR}` selects all except the head."
    if unfit and str(settings.get("target_modules")).lower() == ALL_LINEAR:
        settings["exclude_modules"] = excluding(settings.get("exclude_modules"), sorted(unfit))
        skipped = ", ".join(f"{name} ({why})" for name, why in unfit.items())
        _log.warning("lora.target_modules: all-linear skips %s", skipped)
    try:
        with warnings.catch_warnings():
            for pattern in {"rank_pattern", "alpha_pattern"} - settings.keys():
                # PEFT sets this pattern itself, to double the rank of experts, and warns that no module matches.
                warnings.filterwarnings("ignore", message=f"The following {pattern} keys")
            adapted: Any = get_peft_model(model, LoraConfig(**settings))
    except (ValueError, TypeError) as error:
        raise StayalignedError(f"lora: {' '.join(str(error).split())}", hint=possible) from None
    for name, module in adapted.named_modules():
        last = name.rpartition(".")[2]
        if isinstance(module, LoraLinear) and last in unfit:
            raise StayalignedError(f"lora.target_modules: {last} would never learn: {unfit[last]}", hint=possible)
    return adapted


def _refuse_other_sizes(model: PreTrainedModel, adapter: Path, config: Mapping[str, Any]) -> None:
    """Raise if the adapter holds an embedding with another number of rows than the model's, or states too large a rank.

    PEFT would only report a mismatch of sizes, or allocate the stated rank, which may exhaust the memory.
    """
    from safetensors import safe_open

    embedding: Any = model.get_input_embeddings()
    rows, width = embedding.weight.shape
    with safe_open(adapter / ADAPTER_WEIGHTS, framework="pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    if config["peft_type"] == "LORA":
        largest = max((size for shape in shapes.values() for size in shape), default=0)
        rank = max(config.get("r", 8), *(config.get("rank_pattern") or {}).values(), 0)
        if rank > largest:
            raise StayalignedError(
                f"{adapter}: its configuration states rank {rank}, but none of its tensors has that size",
                hint="The configuration is of another adapter; save the adapter again with PEFT.",
            )
    for name, shape in shapes.items():
        whole = name.startswith(PREFIX) and "embed" in name and not re.search("lora_|trainable_tokens", name)
        if whole and shape[1:] == (width,) and shape[0] != rows:
            raise StayalignedError(
                f"{adapter}: {name} has {shape[0]} rows, but the model's vocabulary has {rows}",
                hint=f"The vocabulary was resized for training. Resize the model to {shape[0]} rows "
                "(`resize_token_embeddings`), save it with the adapter's tokenizer, and name that as the model.",
            )


def _check_values(adapter: Path) -> None:
    """Raise if a tensor of an adapter holds NaN or infinity; warn if all its updates are zero."""
    from safetensors import safe_open

    zero: set[str] = set()
    with safe_open(adapter / ADAPTER_WEIGHTS, framework="pt") as file:
        names = list(file.keys())
        for name in names:
            tensor = file.get_tensor(name)
            if not tensor.any():
                zero.add(name.replace("lora_embedding_B", "lora_embedding_A").replace("lora_B", "lora_A"))
            if tensor.is_floating_point() and not all_finite(tensor.float()):
                raise StayalignedError(
                    f"{adapter}: {name} holds NaN or infinity",
                    hint="Train or download the adapter again: training diverged, or the file is damaged.",
                )
    factors = {name for name in names if re.search(r"lora_(embedding_)?[AB]\b", name)}
    if factors and len(factors) == len(names) == 2 * len(zero):
        _log.warning("%s: the update of every layer is zero: the adapter changes nothing", adapter)


def _trained_class(adapter: Path, loaders: Sequence[Any], config: Any) -> Any:
    """Return the class whose modules have the names in an adapter; the first if none or several have them."""
    import torch

    modules = read_adapter(adapter).modules()
    for loader in loaders:
        with torch.device("meta"):
            names = {name for name, _ in loader.from_config(config, trust_remote_code=False).named_modules()}
        if modules <= names:
            return loader
    return loaders[0]


def _with_adapter(model: PreTrainedModel, ref: str | Path, adapter: Path, trainable: bool = False) -> PeftModel:
    from dataclasses import fields

    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    refuse_unless_adapter(adapter)
    config = read_adapter_config(adapter)
    kind = PEFT_TYPE_TO_CONFIG_MAPPING.get(config["peft_type"])
    if kind is None:
        raise StayalignedError(
            f"{adapter}: peft_type is {one_line(repr(config['peft_type']))}, which PEFT does not know",
            hint=did_you_mean(config["peft_type"], sorted(PEFT_TYPE_TO_CONFIG_MAPPING), "types"),
        )
    refuse_settings(adapter, config, known=[field.name for field in fields(kind)])
    if is_named_model(str(config.get("base_model_name_or_path") or ref), str(ref), Path(ref).expanduser()) is False:
        _log.warning("%s was trained on %s, not on %s", adapter, config["base_model_name_or_path"], ref)
    refuse_slow_patterns(adapter, config, [name for name, _ in model.named_modules()])
    _refuse_other_sizes(model, adapter, config)
    _check_values(adapter)
    hint = "Use the model that the adapter was trained on."
    try:
        with warnings.catch_warnings():
            # PEFT only warns about layers that the file lacks, and leaves them untrained.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            warnings.filterwarnings("ignore", message="Unexpected keyword arguments")  # checked above
            warnings.filterwarnings("ignore", message=r"The following (rank|alpha)_pattern keys")
            with _under_names_of(model, adapter, config["peft_type"]) as directory:
                adapted = PeftModel.from_pretrained(model, str(directory), is_trainable=trainable)
                with safe_open(directory / ADAPTER_WEIGHTS, framework="pt") as file:
                    stored = set(file.keys())
    except (ValueError, RuntimeError, KeyError, TypeError, UserWarning) as error:
        raise StayalignedError(f"{adapter}: the adapter does not fit the model: {_short(error)}", hint=hint) from None
    # PEFT silently ignores tensors that the model lacks. Embeddings beside the factors are loaded into the model.
    dropped = stored - {*get_peft_model_state_dict(adapted, save_embedding_layers=False), *adapted.state_dict()}
    if dropped:
        raise StayalignedError(
            f"{adapter}: the adapter does not fit the model, which lacks {len(dropped)} of its weights, "
            f"such as {min(dropped)}",
            hint=hint,
        )
    return adapted


@contextlib.contextmanager
def _under_names_of(model: PreTrainedModel, adapter: Path, kind: str) -> Generator[Path]:
    """Yield the directory of an adapter; of a copy, if the layers have other names in this model."""
    original = read_adapter(adapter) if kind == "LORA" else None
    translated = translate_adapter(original, model) if original is not None else None
    if translated is None or translated is original:
        yield adapter
        return
    with tempfile.TemporaryDirectory() as temporary:
        write_adapter(translated, Path(temporary))
        yield Path(temporary)


def _require_checkpoint(ref: str | Path) -> None:
    """Refuse a path that is no checkpoint directory, so that it is not looked up on the hub, and adapters."""
    from transformers.utils.peft_utils import find_adapter_config_file

    path = Path(ref).expanduser()
    if path.is_dir():
        refuse_unless_model(path)
        return
    text = str(ref)
    hub_id = text.count("/") <= 1 and not text.startswith((".", "~", "/")) and not path.exists()
    if not hub_id:
        raise StayalignedError(f"{path}: no such directory", hint="Give a checkpoint directory or a hub id.")
    require_hub_model(text)
    config = find_adapter_config_file(text)
    if config is not None:  # transformers would load the adapter, and its base model if the repository holds none
        refuse_adapter_files(Path(config).parent)


def _move_to_accelerator(model: Any) -> Any:
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return model.to(accelerator).eval() if accelerator is not None else model.eval()


def _load_tokenizer(ref: str | Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    _require_checkpoint(ref)
    return _load_pretrained(AutoTokenizer, ref, "tokenizer")


def _load_complete(loader: Any, ref: str | Path, **options: Any) -> Any:
    """Return a model whose weights are all in the checkpoint; transformers would only log missing ones."""
    if Path(ref).expanduser().is_dir():
        refuse_without_weights(Path(ref).expanduser())
    model, found = _load_pretrained(loader, ref, "model", use_safetensors=True, output_loading_info=True, **options)
    missing = sorted(found["missing_keys"])
    if missing:
        raise StayalignedError(
            f"{ref}: lacks {len(missing)} weights of a {type(model).__name__}, such as {missing[0]}",
            hint="The checkpoint is incomplete, or of another kind of model.",
        )
    return model.eval()


def _load_pretrained(loader: Any, ref: str | Path, what: str, **options: Any) -> Any:
    """Call `loader.from_pretrained`, and report an unusable checkpoint as one error."""
    from huggingface_hub.errors import StrictDataclassError

    path = Path(ref).expanduser()
    local = path.is_dir()
    try:
        return loader.from_pretrained(str(path) if local else str(ref), trust_remote_code=False, **options)
    except StrictDataclassError as error:
        raise StayalignedError(
            f"{ref}: can't load the {what}: config.json: {_short(error)}",
            hint="Set that field to a valid value (such as a kernel that is installed).",
        ) from None
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        from huggingface_hub.constants import HF_HUB_OFFLINE

        refuse_unwritable_hub_cache(error)
        text = str(error)
        if what == "tokenizer" and "instantiate the backend tokenizer" in text:
            raise StayalignedError(
                f"{ref}: can't load the tokenizer: no tokenizer.json, and none can be made from its other files",
                hint="Copy the tokenizer's files beside config.json. Vocabularies of SentencePiece and tiktoken need "
                "`pip install sentencepiece tiktoken`.",
            ) from None
        if "trust_remote_code" in text:
            hint = "It needs code from its own repository, which stayaligned does not run; use another architecture."
        elif isinstance(error, ImportError):
            hint = "Install what the message names, or give the same model in bf16, fp16 or fp32."
        elif local:
            hint = f"The directory must contain {_PARTS[what]}."
        elif HF_HUB_OFFLINE:
            hint = "HF_HUB_OFFLINE is set and the hub cache lacks it: unset the variable, or give a directory."
        else:
            hint = "Check the name, the network, and your access: `hf auth login` for gated models."
        raise StayalignedError(f"{ref}: can't load the {what}: {_short(error)}", hint=hint) from None


_PARTS = {
    "model": "config.json and model.safetensors, or its index and shards",
    "tokenizer": "config.json and tokenizer.json (or the tokenizer's own vocabulary files)",
}


def _short(error: BaseException) -> str:
    """Return an error's text on one line, at most 300 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}…"
