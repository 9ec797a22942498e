"""Hostile text as characters that are safe to show: in a terminal, a report, a table."""

from __future__ import annotations

import unicodedata

_KEPT_CONTROLS = frozenset("\n\t\u200c\u200d")
"""Line breaks, tabs, and the two joiners, without which Persian, Hindi and many emoji are misspelt."""
_UNSEEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


def visible(text: str) -> str:
    """`text` with every control, format, bidi and surrogate character written out as ⟨U+202E⟩.

    Such characters can hide text, reverse it, or drive a terminal; escaping for HTML leaves them alone.
    """
    return "".join(
        f"⟨U+{ord(c):04X}⟩" if c not in _KEPT_CONTROLS and unicodedata.category(c) in _UNSEEN else c
        for c in text.replace("\r\n", "\n")
    )
