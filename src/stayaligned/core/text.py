"""Hostile text as characters that are safe to show: in a terminal, a report, a table."""

from __future__ import annotations

import re
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


def one_line(text: str, limit: int = 200) -> str:
    """`text` made visible, on one line, cut after `limit` characters."""
    # A name may be a megabyte long: cut first, so that only what is shown is worked on.
    flat = " ".join(visible(text[: 4 * limit]).split())
    return flat if len(flat) <= limit and len(text) <= 4 * limit else flat[: limit - 1] + "…"


_MARKDOWN = re.compile(r"[\\`*\[\]{}|~$@&<>]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|(?<=\w):(?=//)|(?<=www)\.", re.I)


def markdown(text: str, limit: int = 200) -> str:
    """`text` as inert Markdown for a table cell or a list item.

    Whatever could start markup, HTML, a link or a mention becomes a numeric entity. A backslash before a pipe would
    do for CommonMark, but readers of tables differ in how they split cells.
    """
    return _MARKDOWN.sub(lambda found: f"&#{ord(found.group())};", one_line(text, limit))
