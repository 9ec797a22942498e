"""Numbers and foreign text on their way to a reader. Whatever a model or a label says stays inert. Pure."""

from __future__ import annotations

import math
import re

_MINUS = "\u2212"

# Controls, bidirectional overrides, zero-width and tag characters, lone surrogates: each can make text show as
# something that it is not. Tab and newline stay, and the two joiners that several scripts are written with.
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ufffe\uffff\ud800-\udfff\U000e0000-\U000e007f]"
)
_MARKDOWN = re.compile(r"[&<>|`@\"\\*_\[\]#~!$]|:(?=\S)|(?<=www)\.", re.IGNORECASE)
_BACKSLASH = frozenset("\\*_[]#~!$")
_FORMULA = tuple("=+-@＝＋－＠")


def visible(text: str) -> str:
    """The same text with every character that hides or reorders others written out, as ⟦U+202E⟧."""
    return _UNSEEN.sub(lambda match: f"⟦U+{ord(match[0]):04X}⟧", text.replace("\r\n", "\n"))


def one_line(text: str, limit: int = 80) -> str:
    """`visible` text on one line, at most `limit` characters."""
    line = " ".join(visible(text[: 4 * limit]).split())
    return line if len(line) <= limit else line[: limit - 1].rstrip() + "…"


def markdown(text: str, limit: int = 2000) -> str:
    """Text that Markdown, its tables and the HTML inside it all take literally; it makes no link."""
    return _MARKDOWN.sub(
        lambda match: f"\\{match[0]}" if match[0] in _BACKSLASH else f"&#{ord(match[0])};", one_line(text, limit)
    )


def csv_cell(text: str) -> str:
    """Text that a spreadsheet takes as text: what would start a formula is quoted with '."""
    shown = visible(text)
    return f"'{shown}" if shown.lstrip().startswith(_FORMULA) or shown.startswith("\t") else shown


def percent(share: float | None) -> str:
    """`41.2 %`; `n/a` where there is no number, never 0."""
    return "n/a" if share is None or not math.isfinite(share) else f"{number(share)} %"


def number(share: float | None) -> str:
    """`41.2` for a share of 0.412: percent without the sign."""
    return "n/a" if share is None or not math.isfinite(share) else f"{100 * share:.1f}"


def points(difference: float | None) -> str:
    """`−41.2` for a difference of -0.412: percentage points, with a sign unless it rounds to zero."""
    if difference is None or not math.isfinite(difference):
        return "n/a"
    text = f"{100 * difference:+.1f}"
    return "0.0" if float(text) == 0 else text.replace("-", _MINUS)


def duration(seconds: float) -> str:
    """`8.2 s`, `3 min 20 s` or `2 h 05 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def plain(value: float) -> str:
    """Three significant digits, no exponent: a cosine or a ratio of norms."""
    return "n/a" if not math.isfinite(value) else f"{value:.3g}".replace("-", _MINUS)
