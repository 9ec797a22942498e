"""What a directory holds: one rule for every command about models, adapters, and directories that are neither or both.

transformers loads an adapter that lies beside a model's weights, PEFT reads only the adapter, and a reader of
checkpoints only the weights: which of them is meant has to be stated by the user.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from stayaligned.core.errors import StayalignedError
from stayaligned.core.text import one_line

MODEL_CONFIG = "config.json"
MODEL_WEIGHTS = "model.safetensors"
MODEL_INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

_OF_ADAPTERS = re.compile(
    r"adapter_config\.json|adapter_model.*\.(safetensors|bin|pt|index\.json)|adapters\.(safetensors|npz)"
)
_OF_MODELS = re.compile(
    r"(pytorch_)?model([.-].*)?\.(safetensors|bin|index\.json)|consolidated.*\.(safetensors|pth)|tf_model\.h5|flax_model\.msgpack"
)
_CHECKPOINT = re.compile(r"checkpoint-\d+")
_POINTER = b"version https://git-lfs"
_LONGEST_POINTER = 1024
"""Size in bytes above which a file is no pointer of Git LFS."""
_SAVE_AGAIN = "Load it with transformers and save it with `save_pretrained`, which writes safetensors."
_OTHER_FORMATS = (
    (r".*\.gguf", "GGUF", "Give the model that it was converted from, in safetensors."),
    (
        r"consolidated.*\.(safetensors|pth)|params\.json",
        "the weights in their publisher's own format",
        f"Give the repository or directory in transformers' format, with {MODEL_CONFIG} and {MODEL_WEIGHTS} or its "
        "shards; transformers has conversion scripts.",
    ),
    (r".*\.onnx", "ONNX", "Give the model that it was exported from, in safetensors."),
    (r"global_step\d+|zero_to_fp32\.py", "a DeepSpeed checkpoint", "Convert it: `python zero_to_fp32.py . OUT`."),
    (r"pytorch_model_fsdp_\d+", "an FSDP checkpoint", "Convert it: `accelerate merge-weights DIRECTORY OUT`."),
    (r".*\.h5|.*\.msgpack|.*\.ckpt.*", "weights of TensorFlow or JAX", _SAVE_AGAIN),
    (r".*\.(bin|pt|pth)", "pickled weights", f"{_SAVE_AGAIN} Only safetensors are read."),
    (
        r"model-\d+-of-\d+\.safetensors",
        f"shards without {MODEL_INDEX}, as an interrupted save leaves them",
        "Save or download the model again.",
    ),
    (
        r".*\.safetensors",
        "safetensors under other names",
        f"The weights must be {MODEL_WEIGHTS}, or {MODEL_INDEX} and its shards.",
    ),
)
"""(pattern of a file name, what such a file says that the directory holds, what to do), the first that matches."""


def refuse_unless_model(path: Path) -> None:
    """Raise unless a directory holds a model or its tokenizer in transformers' format, and no adapter.

    Raises:
        StayalignedError: saying what the directory holds instead, and what to give.
    """
    refuse_adapter_files(path)
    names = _names(path)
    if MODEL_CONFIG not in names:
        raise StayalignedError(f"{path} is not a model: it has no {MODEL_CONFIG}", hint=_what_to_give(path, names))


def refuse_adapter_files(path: Path) -> None:
    """Raise if adapter files lie in a directory that was named as a model.

    Raises:
        StayalignedError: saying what to name instead.
    """
    names = _names(path)
    found = sorted(name for name in names if _OF_ADAPTERS.fullmatch(name))
    if not found:
        return
    if not any(_OF_MODELS.fullmatch(name) for name in names):
        raise StayalignedError(f"{path} is an adapter, not a model", hint=_name_both(path))
    listed = ", ".join(found)
    if found == [ADAPTER_CONFIG]:
        raise StayalignedError(
            f"{path} holds a model and {ADAPTER_CONFIG}, but no adapter's weights",
            hint=f"If the adapter was merged into the model, delete {ADAPTER_CONFIG}; otherwise restore the adapter's "
            "weights in a directory of their own.",
        )
    raise StayalignedError(
        f"{path} holds a model and an adapter ({listed}): some programs load both, others only one of them",
        hint="Move the adapter's files into a directory of their own. Then name the model alone, or the model and the "
        "adapter; if the adapter was merged into the model, delete the adapter's files.",
    )


def refuse_without_weights(path: Path) -> None:
    """Raise if a model directory has no weights in safetensors that transformers would find.

    Raises:
        StayalignedError: saying what the directory holds instead.
    """
    names = _names(path)
    if not names & {MODEL_WEIGHTS, MODEL_INDEX}:
        raise StayalignedError(
            f"{path} holds neither {MODEL_WEIGHTS} nor {MODEL_INDEX}", hint=_what_to_give(path, names)
        )
    _refuse_pointers(path)


def refuse_unless_adapter(path: Path) -> None:
    """Raise unless a directory holds one adapter in PEFT's format, in safetensors, and no model's weights.

    Raises:
        StayalignedError: saying what the directory holds instead, and what to give.
    """
    names = _names(path, "Give the directory of a PEFT adapter.")
    weights = sorted(name for name in names if _OF_MODELS.fullmatch(name))
    if ADAPTER_CONFIG in names and weights:
        refuse_adapter_files(path)
    if ADAPTER_CONFIG not in names:
        if MODEL_CONFIG in names:
            raise StayalignedError(
                f"{path} is a whole model, expected an adapter",
                hint="Pass a fully fine-tuned checkpoint to `project` alone, without adapters and without `--scan`; "
                "in an experiment, name it as the model.",
            )
        nested = _children(path, ADAPTER_CONFIG)
        raise StayalignedError(
            f"{path} is not an adapter: it has no {ADAPTER_CONFIG}",
            hint=f"It has adapters in subdirectories, one of which is to be given: {', '.join(nested)}."
            if nested
            else "Give the directory that `save_pretrained` of a PEFT model wrote.",
        )
    if names & {"adapters.safetensors", "adapters.npz"}:
        raise StayalignedError(f"{path} is an adapter of MLX, expected one of PEFT", hint=_MLX)
    if ADAPTER_WEIGHTS in names:
        return _refuse_pointers(path)
    sharded = any(name.endswith(".index.json") for name in names if _OF_ADAPTERS.fullmatch(name))
    raise StayalignedError(
        f"{path} has no {ADAPTER_WEIGHTS}",
        hint=f"It is stored in shards: load it with PEFT and save it in one file. {_CONVERT}"
        if sharded
        else f"It holds pickled weights (.bin), which are not read: convert them to safetensors. {_CONVERT}"
        if "adapter_model.bin" in names
        else f"The adapter's weights must be in {ADAPTER_WEIGHTS}; save or download the adapter again.",
    )


def _refuse_pointers(path: Path) -> None:
    """Raise if a file of weights is a pointer, which Git leaves there if Git LFS is not installed."""
    for file in sorted(path.glob("*.safetensors")):
        try:
            pointer = file.stat().st_size < _LONGEST_POINTER and file.read_bytes().startswith(_POINTER)
        except OSError:  # its reader reports it
            continue
        if pointer:
            raise StayalignedError(
                f"{file} is a pointer of Git LFS, and not the weights",
                hint="Run `git lfs install` and clone the repository again, or download it by `hf download`.",
            )


def refuse_mlx(path: Path) -> None:
    """Raise the error for an `adapter_config.json` that MLX wrote."""
    raise StayalignedError(f"{path / ADAPTER_CONFIG} is of MLX, expected an adapter of PEFT", hint=_MLX)


_MLX = (
    "Merge it: `mlx_lm.fuse --model MODEL --adapter-path ADAPTER --save-path MERGED` (with `--dequantize` for a "
    "quantized model), and give the merged model as a fully fine-tuned checkpoint."
)
_CONVERT = (
    "In Python: `PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(MODEL), ADAPTER)"
    ".save_pretrained(NEW_ADAPTER)`."
)


def _names(path: Path, hint: str = "Give the directory of a model, or a hub id.") -> set[str]:
    try:
        return {file.name for file in path.iterdir()}
    except NotADirectoryError:
        raise StayalignedError(f"{path} is a file, expected a directory", hint=f"Give {path.parent}.") from None
    except FileNotFoundError:
        raise StayalignedError(f"{path}: no such directory", hint=hint) from None
    except OSError as error:
        raise StayalignedError(f"{path} can't be read: {error.strerror}", hint=hint) from None


def _name_both(path: Path) -> str:
    if not (path / ADAPTER_CONFIG).is_file():
        return "Give the model that it was trained on, and this directory as its adapter."
    try:
        content = json.loads((path / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        base = content.get("base_model_name_or_path") or content.get("model")
    except (OSError, ValueError, RecursionError, AttributeError):
        base = None
    model = f"({one_line(base)})" if isinstance(base, str) and base else "(its configuration does not say which)"
    return (
        f"Give the model that it was trained on {model} as the model, and this directory as its adapter: `adapter:` in "
        "an experiment, `--adapter` of `evaluate`, the argument of `project`."
    )


def _what_to_give(path: Path, names: set[str]) -> str:
    """Return the hint for a directory that is no model."""
    models = [*_children(path, MODEL_CONFIG), *_children(path, ADAPTER_CONFIG)]
    if any(_CHECKPOINT.fullmatch(name) for name in names) and models:
        return f"It is the output of a training; give one of its checkpoints: {', '.join(dict.fromkeys(models))}."
    if {"snapshots", "refs"} <= names:
        found = [str(snapshot) for snapshot in sorted((path / "snapshots").iterdir())]
        return f"It is a directory of the hub's cache: give the hub id, or {' or '.join(found)}."
    for pattern, what, hint in _OTHER_FORMATS:
        if any(re.fullmatch(pattern, name) for name in names):
            return f"It holds {what}. {hint}"
    if models and MODEL_CONFIG not in names:
        return f"Models and adapters are in its subdirectories: {', '.join(dict.fromkeys(models))}."
    return "Give a checkpoint directory that `save_pretrained` wrote (not an adapter)."


def _children(path: Path, config: str) -> list[str]:
    """Return the subdirectories that hold a configuration file, at most eight, in the order of their numbers."""

    def number(child: Path) -> tuple[int, str]:
        digits = child.name.rpartition("-")[2]
        return (int(digits) if digits.isascii() and digits.isdigit() and len(digits) < 12 else 0), child.name

    found = sorted({file.parent for file in path.glob(f"*/{config}")}, key=number)
    return [one_line(str(child)) for child in found[-8:]]
