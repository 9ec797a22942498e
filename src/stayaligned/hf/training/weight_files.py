"""Files with copies of a model's trainable weights; if the weights are sharded, one file per process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from stayaligned.algorithms.lisa import Anchor, empty_anchor, local_shard
from stayaligned.algorithms.lisa_schedule import AnchorDevice
from stayaligned.core.errors import StayalignedError
from stayaligned.core.files import replace_file


def trainable_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the trainable weights by name; with FSDP2, this process's shards."""
    reshard(model)
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def reshard(model: nn.Module) -> None:
    """Free the full weights that FSDP2 has gathered.

    After a forward pass without a backward pass it keeps some weights gathered, as tensors other than the optimizer's.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def weights_file(name: str, params: Mapping[str, Tensor], *, rank: int, processes: int) -> str:
    """Return the name of the file for this process's copy of the weights, of which it may have only a part."""
    is_sharded = any(isinstance(param, DTensor) for param in params.values())
    part = f"-{rank:05}-of-{processes:05}" if is_sharded else ""
    return f"{name}{part}.safetensors"


def write_weights(path: Path, weights: Anchor) -> None:
    """Write copies of weights to a file, atomically."""
    from safetensors.torch import save_file

    with replace_file(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, temporary)


def read_weights(path: Path, params: Mapping[str, Tensor], *, device: AnchorDevice) -> Anchor:
    """Read the weights that `write_weights` wrote, onto `device`.

    Raises:
        StayalignedError: if the file is missing, damaged, or of other weights than `params`.
    """
    stored = read_tensors(path)
    described = {name: (tuple(t.shape), t.dtype) for name, t in stored.items()}
    expected = {name: (tuple(local_shard(p).shape), p.dtype) for name, p in params.items()}
    if described != expected:
        differing = sorted(
            name for name in described.keys() | expected.keys() if described.get(name) != expected.get(name)
        )
        raise StayalignedError(
            f"{path} has the weights of another model; they differ in name, shape or type: {', '.join(differing)}",
            hint="Resume with the model and LoRA settings of the checkpoint.",
        )
    weights = empty_anchor(params, device=device)
    for name, tensor in stored.items():
        weights[name].copy_(tensor)
    return weights


def read_tensors(path: Path, device: Any = "cpu") -> dict[str, Tensor]:
    """Read the tensors of a file of a checkpoint.

    Raises:
        StayalignedError: if the file is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(require_file(path), device=str(device))
    except SafetensorError as error:
        raise StayalignedError(f"{path} is damaged: {error}", hint="Resume an earlier checkpoint.") from None


def require_file(file: Path) -> Path:
    """Return the file if it exists.

    Raises:
        StayalignedError: if the file is missing, as in a checkpoint that was written by another method.
    """
    if not file.is_file():
        raise StayalignedError(
            f"{file.parent} can't be resumed with this method: {file.name} is missing",
            hint="Resume a checkpoint that was written with it and without save_only_model, or start a new run.",
        )
    return file
