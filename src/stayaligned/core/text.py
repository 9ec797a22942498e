"""Untrusted text made safe to show in a terminal, a report or a table; the format of percentages."""

from __future__ import annotations

import codecs
import io
import re
import sys
import unicodedata

_KEPT_CONTROLS = frozenset("\n\t\u200c\u200d")
"""Line breaks, tabs, and the two joiners, which Persian, Hindi and many emoji need."""
_INVISIBLE = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})

_WITHOUT_WIDTH = _INVISIBLE - {"Cs"} | {"Mn", "Me"}
_BLANKS = frozenset("\u115f\u1160\u2800\u3164\uffa0")
"""Letters and symbols that show nothing: the fillers of Hangul, and Braille's blank."""


def visible(text: str) -> str:
    """Return `text` with every control, format, bidi and surrogate character written as ⟨U+202E⟩.

    Such characters can hide text, reverse it, or control a terminal; escaping for HTML does not change them.
    """
    return "".join(
        f"⟨U+{ord(c):04X}⟩" if c not in _KEPT_CONTROLS and unicodedata.category(c) in _INVISIBLE else c
        for c in text.replace("\r\n", "\n")
    )


def is_blank(text: str) -> bool:
    """Return whether a text shows nothing: only space, and characters of no width such as U+200B."""
    return all(c.isspace() or c in _BLANKS or unicodedata.category(c) in _WITHOUT_WIDTH for c in text)


_ASCII = {
    **dict.fromkeys("−–—‐‑", "-"),
    **dict.fromkeys("‘’", "'"),
    **dict.fromkeys("“”", '"'),
    "±": "+-",
    "×": "x",
    "·": "|",
    "…": "...",
    "≠": "!=",
    "≤": "<=",
    "≥": ">=",
    "→": "->",
    "†": "+",
    "◆": "*",
    "Δ": "change of",
    "‖": "||",
    "ρ": "rho",
    "λ": "lambda",
    "²": "^2",
    "↑": "^",
    "↓": "v",
    "⟨": "<",
    "⟩": ">",
}
"""What is written for characters of this project's own texts on a terminal without them."""


def escape_unencodable() -> None:
    """Let stdout and stderr write what their encoding lacks in ASCII, or as an escape, instead of raising an error."""

    def replace(error: UnicodeError) -> tuple[str, int]:
        if not isinstance(error, UnicodeEncodeError):
            raise error
        lacking = error.object[error.start : error.end]
        escaped = (_ASCII.get(c) or c.encode("ascii", "backslashreplace").decode() for c in lacking)
        return "".join(escaped), error.end

    codecs.register_error("stayaligned.ascii", replace)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="stayaligned.ascii")


def one_line(text: str, limit: int = 200) -> str:
    """Return `text` on one line, made visible, and cut after `limit` characters."""
    # A name may be a megabyte long: cut first, so that only the shown part is processed.
    flat = " ".join(visible(text[: 4 * limit]).split())
    return flat if len(flat) <= limit and len(text) <= 4 * limit else flat[: limit - 1] + "…"


_MARKDOWN = re.compile(r"[\\`*\[\]{}|~$@&<>]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|(?<=\w):(?=//)|(?<=www)\.", re.I)


def markdown(text: str, limit: int = 200) -> str:
    """Return `text` as inert Markdown for a table cell or a list item.

    Characters that could start markup, HTML, a link or a mention become numeric entities. CommonMark also accepts a
    backslash before a pipe, but programs differ in how they split table cells.
    """
    return _MARKDOWN.sub(lambda found: f"&#{ord(found.group())};", one_line(text, limit))


SHARE = (0.0, 1.0)
"""Scale of a share."""


def percent(value: float | None, *, signed: bool = False, scale: tuple[float, float] = SHARE) -> str:
    """Format a share as a percentage with one decimal: `3.5`, with `signed` `−12.0` or `+3.5`, `n/a` for None.

    A value on another `scale` than 0 to 1 keeps its own units, with two decimals.
    """
    if value is None:
        return "n/a"
    digits = 1 if scale == SHARE else 2
    rounded = round((100 if scale == SHARE else 1) * value, digits) + 0.0
    return f"{rounded:+.{digits}f}".replace("-", "−") if signed else f"{rounded:.{digits}f}"
