"""Formatting of numbers, and escaping of untrusted text for SVG and CSV."""

from __future__ import annotations

import html
from collections.abc import Iterable

from stayaligned.core.text import SHARE, one_line, percent, visible
from stayaligned.report.values import ArmDifference, Estimate


def csv_cell(text: str) -> str:
    """Return `text` for a CSV cell, with an apostrophe in front if a spreadsheet would read it as a formula."""
    shown = visible(text)
    return f"'{shown}" if shown.lstrip()[:1] in tuple("=+-@＝＋－＠") or shown[:1] in ("\t", "\n") else shown


def has_long_word(text: str) -> bool:
    """Whether a word is so long that a column of a table must break it."""
    return any(len(word) > _LONG_WORD for word in text.split())


_LONG_WORD = 18
"""Characters of a word that fit in a column on a phone."""


def attribute(text: str) -> str:
    """Escape `text` for an attribute or a text of an SVG."""
    return html.escape(one_line(text), quote=True)


def bounds(low: float | None, high: float | None, *, signed: bool = False, scale: tuple[float, float] = SHARE) -> str:
    """Format an interval with `percent`: `30.0 to 44.6`; empty without an interval."""
    if low is None or high is None:
        return ""
    return f"{percent(low, signed=signed, scale=scale)} to {percent(high, signed=signed, scale=scale)}"


def rough_bounds(low: float | None, high: float | None, scale: tuple[float, float] = SHARE) -> str:
    """Format an interval in whole percent: `30–45`; on another scale with its decimals."""
    if low is None or high is None:
        return ""
    return f"{100 * low:.0f}–{100 * high:.0f}" if scale == SHARE else f"{low:.2f}–{high:.2f}"


def scale_position(scale: tuple[float, float], value: float) -> float:
    """Return the position of a value on its scale, from 0 to 1."""
    return (value - scale[0]) / (scale[1] - scale[0])


def p_value(value: float) -> str:
    """Format a p-value with two significant digits."""
    return "below 0.001" if value < 0.001 else f"{value:.2g}"


def unscored_count(estimate: Estimate) -> str:
    """Format the number of unscored items: `0 of 150 scored` or `3 of 150 unscored`; empty if all are scored."""
    total = estimate.n + estimate.n_unscored
    if estimate.mean is None:
        return f"{estimate.n} of {total} scored"
    return f"{estimate.n_unscored} of {total} unscored" if estimate.n_unscored else ""


def sample_size(estimate: Estimate) -> str:
    """Format the numbers of prompts and seeds: `200 × 3 seeds`, `199–200 × 3 seeds`."""
    counts = [metric.n for metric in estimate.by_seed.values()]
    prompts = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)}–{max(counts)}"
    return f"{prompts} × {_count_seeds(len(counts))}"


def _count_seeds(n: int) -> str:
    return "1 seed" if n == 1 else f"{n} seeds"


def describe_seeds(difference: ArmDifference) -> str:
    """Describe in how many seeds a difference has its more frequent sign: `lower in 3/3 seeds`."""
    paired = difference.paired
    n = len(paired.pairs)
    if not n:
        return "no common seed"
    if paired.n_lower == paired.n_higher == 0:
        return f"equal in {n}/{_count_seeds(n)}"
    side, count = ("lower", paired.n_lower) if paired.n_lower >= paired.n_higher else ("higher", paired.n_higher)
    return f"{side} in {count}/{_count_seeds(n)}"


def join_names(names: Iterable[str], limit: int = 6) -> str:
    """Join names as `A`, `A and B`, `A, B and C`; beyond `limit` names, the number of further names."""
    shown = [one_line(name, 60) for name in names]
    if len(shown) > limit:
        shown = [*shown[: limit - 1], f"{len(shown) - limit + 1} more"]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}" if shown else "none"
