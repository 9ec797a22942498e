"""Numbers and hostile text as characters that are safe to print, in HTML, Markdown, CSV and the terminal."""

from __future__ import annotations

import html
from collections.abc import Iterable

from stayaligned.core.text import one_line, visible
from stayaligned.report.values import Difference, Estimate


def csv_cell(text: str) -> str:
    """`text` for a CSV cell; one that a spreadsheet would take for a formula gets an apostrophe in front."""
    shown = visible(text)
    return f"'{shown}" if shown.lstrip()[:1] in tuple("=+-@＝＋－＠") or shown[:1] in ("\t", "\n") else shown


def attribute(text: str) -> str:
    """`text` for an attribute or text of an SVG."""
    return html.escape(one_line(text), quote=True)


_SHARE = (0.0, 1.0)


def percent(value: float | None, *, signed: bool = False, scale: tuple[float, float] = _SHARE) -> str:
    """A share as a percentage with one decimal: 3.5, -12.0 with `signed` as −12.0, n/a for None.

    What is on another `scale` than 0 to 1 is no share: it keeps its own units, with two decimals.
    """
    if value is None:
        return "n/a"
    digits = 1 if scale == _SHARE else 2
    rounded = round((100 if scale == _SHARE else 1) * value, digits) + 0.0
    return f"{rounded:+.{digits}f}".replace("-", "−") if signed else f"{rounded:.{digits}f}"


def bounds(low: float | None, high: float | None, *, signed: bool = False, scale: tuple[float, float] = _SHARE) -> str:
    """An interval as `percent` writes its ends, `30.0 to 44.6`; empty if there is none."""
    if low is None or high is None:
        return ""
    return f"{percent(low, signed=signed, scale=scale)} to {percent(high, signed=signed, scale=scale)}"


def along(scale: tuple[float, float], value: float) -> float:
    """Where a value lies on its scale, 0 to 1."""
    return (value - scale[0]) / (scale[1] - scale[0])


def p_value(value: float) -> str:
    """A p-value with two digits that count, and none that don't."""
    return "below 0.001" if value < 0.001 else f"{value:.2g}"


def unscored(estimate: Estimate) -> str:
    """`0 of 150 scored` where nothing has a value, `3 of 150 unscored` where some have none; else empty."""
    total = estimate.n + estimate.n_unscored
    if estimate.mean is None:
        return f"{estimate.n} of {total} scored"
    return f"{estimate.n_unscored} of {total} unscored" if estimate.n_unscored else ""


def sample_size(estimate: Estimate) -> str:
    """Prompts and seeds behind a number: `200 × 3 seeds`, `199–200 × 3 seeds`."""
    counts = [metric.n for metric in estimate.by_seed.values()]
    prompts = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)}–{max(counts)}"
    return f"{prompts} × {_seeds(len(counts))}"


def _seeds(n: int) -> str:
    return "1 seed" if n == 1 else f"{n} seeds"


def seeds_below(difference: Difference) -> str:
    """`lower in 3/3 seeds`: the sign count of a paired difference, said of the larger side."""
    paired = difference.paired
    n = len(paired.pairs)
    if not n:
        return "no seed in common"
    if paired.n_lower == paired.n_higher == 0:
        return f"equal in {n}/{_seeds(n)}"
    side, count = ("lower", paired.n_lower) if paired.n_lower >= paired.n_higher else ("higher", paired.n_higher)
    return f"{side} in {count}/{_seeds(n)}"


def listed(names: Iterable[str], limit: int = 6) -> str:
    """`A`, `A and B`, `A, B and C`; beyond `limit` names, how many more."""
    shown = [one_line(name, 60) for name in names]
    if len(shown) > limit:
        shown = [*shown[: limit - 1], f"{len(shown) - limit + 1} more"]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}" if shown else "none"
