"""Pico checkpoint pairs, and their weights as they are in memory and in the files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from stayaligned.checkpoints import Checkpoint, Weight, open_checkpoint
from stayaligned.testing import write_pico_checkpoint

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
PairOf = Callable[..., tuple[Checkpoint, Checkpoint]]


def write_pair(root: Path, architecture: str, **model: Any) -> tuple[Checkpoint, Checkpoint]:
    """(aligned, base), the base in shards."""
    aligned = write_pico_checkpoint(root / "aligned", architecture, seed=2, **model)
    base = write_pico_checkpoint(root / "base", architecture, seed=1, shard_size="30KB", **model)
    return open_checkpoint(aligned), open_checkpoint(base)


def load(directory: Path) -> Any:
    """The model, by transformers."""
    return AutoModelForCausalLM.from_pretrained(directory)


def in_memory(model: Any, parameter: str, expert: int | None) -> torch.Tensor:
    """A parameter, or one expert's matrix."""
    weight = model.get_parameter(parameter).detach()
    return weight if expert is None else weight[expert]


def rows_of(checkpoint: Checkpoint, weight: Weight) -> torch.Tensor:
    """A weight, read through its blocks."""
    parts = []
    for block in weight:
        tensor = checkpoint[block.name] if block.expert is None else checkpoint[block.name][block.expert]
        parts.append(tensor[block.first_row :][: block.rows])
    return torch.cat(parts)
