"""Several processes of one run, as `torchrun` and `accelerate launch` start them: one leads, the others help to train.

Only training is done by all. The leader alone reads and writes stages, generates and judges. Imports no torch.
"""

from __future__ import annotations

import os
from typing import Any

from stayaligned.core.errors import StayalignedError


def several() -> bool:
    """Whether this process was started as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def leads() -> bool:
    """Whether this process is the first of them, or alone."""
    return int(os.environ.get("RANK", "0")) == 0


def share(value: Any = None) -> Any:
    """What the leader calls it with, in every process; each waits here for the leader."""
    import torch
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    PartialState(cpu=not torch.accelerator.is_available())
    values = [value]
    broadcast_object_list(values)
    return values[0]


def refuse_several(command: str) -> None:
    """Refuse a command that runs in one process, where it was started in several.

    Raises:
        StayalignedError: then.
    """
    if several():
        raise StayalignedError(
            f"`{command}` runs in one process, and this is one of {os.environ['WORLD_SIZE']}",
            hint="Start it without torchrun or accelerate launch.",
        )
