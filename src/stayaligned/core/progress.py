"""How a long computation reports its progress."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, float], None]
"""Takes the name of the current work and the completed share, 0 to 1."""


def silent(text: str, share: float) -> None:
    """Report no progress; the default."""
    del text, share
