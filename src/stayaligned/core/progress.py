"""How long work tells its caller where it is."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, float], None]
"""Takes the name of what is being done and the share of it that is done, 0 to 1."""


def silent(text: str, share: float) -> None:
    """Show no progress: the default."""
    del text, share
