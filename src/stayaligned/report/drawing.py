"""Matplotlib figures as SVG for a page, with the page's colors and fonts and with unique identifiers."""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from stayaligned.core.extras import EXTRAS, require_packages
from stayaligned.report.texts import attribute

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Placeholder colors for matplotlib; the page's colors, light or dark, replace them.
INK, FAINT, BLUE, ORANGE, GRAY, PAPER = "#010203", "#010204", "#010205", "#010206", "#010207", "#010208"
_PAGE_COLORS = {
    INK: "currentColor",
    FAINT: "var(--rule)",
    BLUE: "var(--blue)",
    ORANGE: "var(--orange)",
    GRAY: "var(--gray)",
    PAPER: "var(--paper)",
}
_PIXEL = 1 / 72
"""One pixel in inches: matplotlib writes SVG at 72 dots per inch, whatever `dpi` is."""


@contextmanager
def drawing(width: int, height: int) -> Generator[Figure]:
    """Create an empty figure of the given size in pixels, in a fixed style that ignores the user's matplotlibrc."""
    require_packages({"the report": EXTRAS["report"]})
    log = logging.getLogger("matplotlib")
    before = log.level
    log.setLevel(logging.ERROR)  # when imported, it warns of a home that can't be written, and does without
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    log.setLevel(before)

    style: dict[Any, Any] = {
        "figure.dpi": 72,
        "svg.hashsalt": "stayaligned",
        "svg.fonttype": "none",
        "svg.id": None,
        "font.family": "DejaVu Sans",
        "font.size": 11,
        "text.color": INK,
        "text.parse_math": False,
        "axes.edgecolor": FAINT,
        "axes.labelcolor": INK,
        "axes.facecolor": "none",
        "axes.titlesize": 11,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "grid.color": FAINT,
        "grid.linewidth": 0.6,
        "xtick.color": FAINT,
        "ytick.color": FAINT,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "xtick.labelsize": 10,
        "ytick.labelsize": 10,
    }
    with matplotlib.rc_context(), warnings.catch_warnings():
        # The page draws text with the reader's fonts; a glyph missing from matplotlib's font only shifts the layout.
        warnings.filterwarnings("ignore", message="Glyph")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(style)
        figure = Figure(figsize=(width * _PIXEL, height * _PIXEL), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure


def svg(figure: Figure, name: str, description: str) -> str:
    """Render the figure as one `<svg>` element; `name` is the prefix of its identifiers."""
    stream = io.StringIO()
    figure.savefig(
        stream, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
    )
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    # Keep only identifiers that are referenced, numbered: names of groups repeat from figure to figure.
    used = list(dict.fromkeys(re.findall(r'(?:url\(#|href="#)([^")]+)', text)))
    text = re.sub(r' id="([^"]*)"', lambda m: f' id="{name}-{used.index(m[1])}"' if m[1] in used else "", text)
    text = re.sub(r'(url\(#|href="#)([^")]+)', lambda m: f"{m[1]}{name}-{used.index(m[2])}", text)
    text = re.sub(
        r'(?<= )(d|x|y)="[^"]*"', lambda m: re.sub(r"\d+\.\d{3,}", _round_number, " ".join(m[0].split())), text
    )
    text = re.sub(r">\s+<", "><", text)
    for stand_in, color in _PAGE_COLORS.items():
        text = text.replace(stand_in, color)
    width, height = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text).groups()  # pyright: ignore[reportOptionalMemberAccess]
    head = f'<svg viewBox="0 0 {width} {height}" width="{float(width):g}" height="{float(height):g}" role="img" '
    body = text[text.index(">", text.index("<svg")) + 1 :]
    return f'{head}aria-label="{attribute(description)}">{body}'.rstrip()


def _round_number(found: re.Match[str]) -> str:
    """Write a coordinate with a hundredth of a pixel."""
    return f"{float(found[0]):.2f}".rstrip("0").rstrip(".")


def standalone(text: str) -> str:
    """Convert a figure of `svg` to a standalone file, with the namespaces and colors that a page would provide."""
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    style = "<style>:root{--rule:#ccc;--blue:#0b5fa5;--orange:#b45309;--gray:#777;--paper:#fff}</style>"
    return text.replace("<svg ", f"<svg {spaces} ", 1).replace(">", f">{style}", 1) + "\n"


def share_axis(axes: Axes, which: Literal["x", "y"]) -> None:
    """Format one axis in percent, from 0 to 100 with room for marks at the ends, and above 100 for their names."""
    from matplotlib.ticker import FixedLocator, PercentFormatter

    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    axis.set_major_locator(FixedLocator([step / 5 for step in range(6)]))
    axes.set(**{f"{which}lim": (-0.03, 1.03 if which == "x" else 1.16)})
