"""Copies of a model's trainable weights as files, each process's shards apart where the weights are sharded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from stayaligned.algorithms.lisa import Anchor, Device, empty_anchor, local
from stayaligned.core.errors import StayalignedError
from stayaligned.core.files import replace_file


def trainable_weights(model: nn.Module) -> dict[str, Tensor]:
    """The trainable weights by name; of FSDP2 this process's shards."""
    reshard(model)
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def reshard(model: nn.Module) -> None:
    """Give up what FSDP2 has gathered.

    After a forward pass without a backward one it keeps some weights whole, as other tensors than the optimizer's, in
    memory that it frees later.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def is_sharded(params: Mapping[str, Tensor]) -> bool:
    """Whether each process holds a part of the weights only."""
    return any(isinstance(param, DTensor) for param in params.values())


def weights_file(name: str, params: Mapping[str, Tensor], *, rank: int, processes: int) -> str:
    """The name of the file in which this process keeps a copy of its weights."""
    part = f"-{rank:05}-of-{processes:05}" if is_sharded(params) else ""
    return f"{name}{part}.safetensors"


def write_weights(path: Path, weights: Anchor) -> None:
    """Write copies of weights; the file appears whole or not at all."""
    from safetensors.torch import save_file

    with replace_file(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, temporary)


def read_weights(path: Path, params: Mapping[str, Tensor], *, device: Device) -> Anchor:
    """The weights that `write_weights` wrote, where a copy of `params` is kept.

    Raises:
        StayalignedError: if the file is missing, damaged, or of other weights than `params`.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        stored = load_file(require_file(path))
    except SafetensorError as error:
        raise StayalignedError(f"{path} is damaged: {error}", hint="Resume an earlier checkpoint.") from None
    described = {name: (tuple(t.shape), t.dtype) for name, t in stored.items()}
    expected = {name: (tuple(local(p).shape), p.dtype) for name, p in params.items()}
    if described != expected:
        differing = sorted(
            name for name in described.keys() | expected.keys() if described.get(name) != expected.get(name)
        )
        raise StayalignedError(
            f"{path} holds the weights of another model; differing in name, shape or type: {', '.join(differing)}",
            hint="Resume with the model and LoRA settings that the checkpoint was made with.",
        )
    weights = empty_anchor(params, device=device)
    for name, tensor in stored.items():
        weights[name].copy_(tensor)
    return weights


def require_file(file: Path) -> Path:
    """The file itself, if it is there.

    Raises:
        StayalignedError: if not; what the host wrote alone cannot be resumed.
    """
    if not file.is_file():
        raise StayalignedError(
            f"{file.parent} cannot be resumed with Lisa: it has no {file.name}",
            hint="Resume a checkpoint that Lisa wrote (not one with save_only_model), or start anew.",
        )
    return file
