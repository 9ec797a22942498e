"""Whether the model that an adapter names is the one that it is used with."""

from __future__ import annotations

import re
from pathlib import Path

from stayaligned.core.errors import StayalignedError
from stayaligned.weights.checkpoints import Checkpoint, is_hub_id, weights_fingerprint

_COPIES = re.compile(r"([-_.](unsloth|bnb|[48]bit|int[48]|fp8|bf16|fp16|gptq|awq|hf|nf4|w4a16|mlx))+$")
"""Ends of the names of quantized or converted copies of a model."""


def is_named_model(named: str, ref: str, directory: Path) -> bool | None:
    """Return whether a name is that of a model: the `base_model_name_or_path` of an adapter.

    Local directories are compared by their weights, and hub ids by their names: of equal names of two owners, nothing
    is known, since one may be a copy.

    Args:
        named: a directory or a hub id.
        ref: the model as it was given: a directory or a hub id, which may have a revision.
        directory: where the model is; need not exist for a hub id.

    Returns:
        None if it can't be said: a directory is no longer there, or its weights are quantized.
    """
    given = ref.partition("@")[0]
    if Path(named).is_dir():
        return _has_weights_of(Path(named), directory) if directory.is_dir() else None
    if named == given:
        return True
    if not is_hub_id(named) or not is_hub_id(given) or Path(given).is_dir() or _plain_name(named) == _plain_name(given):
        return None
    return False


def _has_weights_of(one: Path, other: Path) -> bool | None:
    if one.resolve() == other.resolve():
        return True
    try:
        found = Checkpoint(one), Checkpoint(other)
        if any(checkpoint.config().get("quantization_config") for checkpoint in found):
            return None
        first, second = map(weights_fingerprint, found)
    except StayalignedError:
        return None
    return first == second or _equal_in_another_type(*found)


def _equal_in_another_type(one: Checkpoint, other: Checkpoint) -> bool:
    """Return whether one checkpoint is the other, stored in another type (bf16 of fp32)."""
    import torch

    if set(one) != set(other):
        return False
    for name in one:
        x, y = one[name], other[name]
        if x.dtype == y.dtype and not torch.equal(x, y):
            return False
        if not (torch.equal(x.to(y.dtype), y) or torch.equal(y.to(x.dtype), x)):
            return False
    return True


def _plain_name(hub_id: str) -> str:
    """Return the name without its owner and the marks of a quantized or converted copy."""
    return _COPIES.sub("", hub_id.rpartition("/")[2].lower().removeprefix("meta-"))
