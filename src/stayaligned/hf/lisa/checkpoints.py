"""What Lisa adds to a checkpoint of the host, and whether a checkpoint is of the same run.

- `lisa.json`: what must be equal for a resumed run to be the same run, and how far an adaptive pull has got.
- `lisa_anchor.safetensors`: the anchor. Where the weights are sharded (FSDP2) each process keeps its own shards in
  `lisa_anchor-RANK-of-PROCESSES.safetensors`.
- `lisa_start.safetensors`: in the output directory, once: the weights that `drift_from_start` is measured from.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from stayaligned.bistate import Anchor, Device, empty_anchor, local
from stayaligned.errors import StayalignedError
from stayaligned.files import replace_file, write_text

ANCHOR, START = "lisa_anchor", "lisa_start"
STATE_FILE = "lisa.json"
_PROGRESS = "progress"


def is_sharded(params: Mapping[str, Tensor]) -> bool:
    """Whether each process holds a part of the weights only."""
    return any(isinstance(param, DTensor) for param in params.values())


def weights_file(name: str, params: Mapping[str, Tensor], *, rank: int, processes: int) -> str:
    """The name of the file in which this process keeps a copy of its weights."""
    part = f"-{rank:05}-of-{processes:05}" if is_sharded(params) else ""
    return f"{name}{part}.safetensors"


def write_run(checkpoint: Path, run: Mapping[str, Any], progress: Mapping[str, Any]) -> None:
    """Write `lisa.json` into a checkpoint."""
    write_text(checkpoint / STATE_FILE, json.dumps({**run, _PROGRESS: progress}, indent=2) + "\n")


def read_progress(checkpoint: Path) -> dict[str, Any]:
    """The progress that `write_run` was given.

    Raises:
        StayalignedError: if the file is not there or damaged.
    """
    return _read_state(checkpoint).get(_PROGRESS, {})


def require_same_run(checkpoint: Path, expected: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that another run wrote.

    Raises:
        StayalignedError: that names every setting that differs.
    """
    found = _read_state(checkpoint)
    differing = [
        f"{key}={found.get(key)} there, {value} here" for key, value in expected.items() if found.get(key) != value
    ]
    if differing:
        raise StayalignedError(
            f"{checkpoint} was made by another run: {'; '.join(differing)}",
            hint="Resume with the settings, data, batch size and number of processes it was made with, "
            "or start anew from its weights.",
        )


def _read_state(checkpoint: Path) -> dict[str, Any]:
    state_file = _require(checkpoint / STATE_FILE)
    try:
        return json.loads(state_file.read_text(encoding="utf-8"))
    except ValueError:
        raise StayalignedError(f"{state_file} is not JSON", hint="Resume an earlier checkpoint.") from None


def _require(file: Path) -> Path:
    if not file.is_file():
        raise StayalignedError(
            f"{file.parent} cannot be resumed with Lisa: it has no {file.name}",
            hint="Resume a checkpoint that Lisa wrote (not one with save_only_model), or start anew.",
        )
    return file


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
        stored = load_file(_require(path))
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
