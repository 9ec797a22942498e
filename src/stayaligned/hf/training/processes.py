"""The exchange between the processes of one distributed run."""

from __future__ import annotations

from typing import Any


def broadcast(value: Any = None) -> Any:
    """Return the leader's value in every process; each process waits here for the leader."""
    import torch
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    PartialState(cpu=not torch.accelerator.is_available())
    values = [value]
    broadcast_object_list(values)
    return values[0]
