"""How a long computation reports its progress."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives what a long computation is doing, how much of that is done, and details of it."""

    def __call__(self, work: str, share: float, detail: str = "", /) -> None:
        """Receive one report; called often, so it returns quickly.

        Args:
            work: name of the current work, such as "train lisa"; it is the same until other work begins.
            share: the part of this work that is done, 0 to 1.
            detail: what else is worth knowing at this moment, such as "step 12 of 60, loss 1.23".
        """


class WorkProgress(Protocol):
    """A `Progress` of work whose name the receiver knows already."""

    def __call__(self, share: float, detail: str = "", /) -> None:
        """Receive one report; see `Progress`."""


def silent(work: str, share: float, detail: str = "", /) -> None:
    """Report no progress; the default."""
    del work, share, detail
