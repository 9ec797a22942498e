"""Write checkpoints of a few tensors and pairs of tiny models, and read their weights in memory and from the files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from stayaligned.hf.placement.layers import place_adapter
from stayaligned.testing import write_pico_adapter, write_pico_checkpoint
from stayaligned.weights.adapters import Adapter, LoraLayer
from stayaligned.weights.checkpoints import Checkpoint, Weight, open_checkpoint

INDEX = "model.safetensors.index.json"
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
PairOf = Callable[..., tuple[Checkpoint, Checkpoint]]


def write_pair(root: Path, architecture: str, **model: Any) -> tuple[Checkpoint, Checkpoint]:
    """Write an aligned and a base model, the base in shards, and open both."""
    aligned = write_pico_checkpoint(root / "aligned", architecture, seed=2, **model)
    base = write_pico_checkpoint(root / "base", architecture, seed=1, ancestor=2, shard_size="30KB", **model)
    return open_checkpoint(aligned), open_checkpoint(base)


def lora_layers(adapter: Adapter, checkpoint: Checkpoint) -> list[LoraLayer]:
    """Return the adapter's layers on the model that it was trained on."""
    return [placed.layer for placed in place_adapter(adapter, checkpoint, checkpoint)]


def load(directory: Path) -> Any:
    """Load the model with transformers."""
    return AutoModelForCausalLM.from_pretrained(directory)


def in_memory(model: Any, parameter: str, expert: int | None) -> torch.Tensor:
    """Return a parameter, or the matrix of one expert."""
    weight = model.get_parameter(parameter).detach()
    return weight if expert is None else weight[expert]


def rows_of(checkpoint: Checkpoint, weight: Weight) -> torch.Tensor:
    """Read a weight through its blocks."""
    parts = []
    for block in weight:
        tensor = checkpoint[block.name] if block.expert is None else checkpoint[block.name][block.expert]
        parts.append(tensor[block.first_row :][: block.rows])
    return torch.cat(parts)


def write(directory: Path, tensors: dict[str, torch.Tensor], shards: int = 1) -> Path:
    """Write tensors as a checkpoint with a number of shards."""
    directory.mkdir()
    if shards == 1:
        save_file(tensors, directory / "model.safetensors")
        return directory
    weight_map: dict[str, str] = {}
    for number in range(shards):
        name = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(tensors.items())[number::shards])
        save_file(part, directory / name)
        weight_map |= dict.fromkeys(part, name)
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return directory


def weights(seed: int, count: int = 5, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Return small random matrices under the names of layers."""
    generator = torch.Generator().manual_seed(seed)
    return {f"layers.{i}.weight": torch.randn(3, 4, generator=generator).to(dtype) for i in range(count)}


def pair(tmp_path: Path, aligned_shards: int = 1, base_shards: int = 1) -> tuple[Checkpoint, Checkpoint]:
    return (
        Checkpoint(write(tmp_path / "aligned", weights(0), aligned_shards)),
        Checkpoint(write(tmp_path / "base", weights(1), base_shards)),
    )


def write_family(root: Path, **adapter: Any) -> Path:
    """Write `chat`, its `base`, its fine-tune `tuned`, an `adapter` on chat, and `unrelated`, of another seed."""
    write_pico_checkpoint(root / "chat", seed=0)
    write_pico_checkpoint(root / "base", seed=1, ancestor=0)
    write_pico_checkpoint(root / "tuned", seed=3, ancestor=0)
    write_pico_checkpoint(root / "unrelated", seed=7)
    write_pico_adapter(root / "adapter", root / "chat", **adapter)
    return root
