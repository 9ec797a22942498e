"""The processes of one distributed run, as `torchrun` and `accelerate launch` start them.

All processes train. Only the first, the leader, reads and writes stages, generates and judges.
"""

from __future__ import annotations

import os

from stayaligned.core.errors import StayalignedError


def is_distributed() -> bool:
    """Return whether this process was started as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_leader() -> bool:
    """Return whether this process is the first of its run, or the only one."""
    return int(os.environ.get("RANK", "0")) == 0


def require_one_process(command: str) -> None:
    """Check that a command that runs in one process was not started in several.

    Raises:
        StayalignedError: if this process is one of several.
    """
    if is_distributed():
        raise StayalignedError(
            f"`{command}` runs in one process, but was started in {os.environ['WORLD_SIZE']}",
            hint="Start it without torchrun or accelerate launch.",
        )
