"""The figures of a report, as SVG."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from stayaligned.core.text import one_line, percent
from stayaligned.report.drawing import BLUE, GRAY, INK, ORANGE, PAPER, drawing, share_axis, svg
from stayaligned.report.texts import join_names
from stayaligned.report.training import BY_PHASE, SEPARATE
from stayaligned.report.values import Arm, Estimate, ModuleEffect, PatchSummary, Points, Report, Training

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# ---- harm against accuracy -----------------------------------------------------------------------------------------

Point = tuple[float, float]

_MARKERS = (*"os^vPX<>p*h8", (4, 1, 0), (3, 1, 0))
"""One shape for each arm, in the order of the legend; repeated where there are more arms."""


@dataclass(frozen=True, slots=True)
class _Mark:
    """One arm in the plot of harm against accuracy."""

    arm: Arm
    harm: Estimate
    gain: Estimate
    mean: Point
    """Mean harm and mean accuracy."""
    shape: str | tuple[int, int, int]

    @property
    def color(self) -> str:
        """Blue on the front, gray for controls and for arms that are not comparable."""
        return BLUE if self.arm.on_front else INK if self.arm.comparable and not self.arm.control else GRAY

    @property
    def name(self) -> str:
        """The arm's name in the legend, with ◆ on the front."""
        return f"{'◆ ' if self.arm.on_front else ''}{one_line(self.arm.name, 26)}"

    @property
    def seeds(self) -> list[Point]:
        """Harm and accuracy of each seed that has both; empty for one seed, whose value is the mean."""
        pairs = [(m.value, n.value) for seed, m in self.harm.by_seed.items() if (n := self.gain.by_seed.get(seed))]
        points = [(x, y) for x, y in pairs if x is not None and y is not None]
        return points if len(points) > 1 else []

    @property
    def intervals(self) -> list[tuple[Point, Point]]:
        """End points of the interval of harm and of the interval of accuracy, where they exist."""
        (x, y), harm, gain = self.mean, self.harm, self.gain
        across = [((harm.low, y), (harm.high, y))] if harm.low is not None and harm.high is not None else []
        upright = [((x, gain.low), (x, gain.high))] if gain.low is not None and gain.high is not None else []
        return across + upright


def harm_against_accuracy(report: Report) -> str | None:
    """Plot mean harm against mean accuracy of every arm, with intervals and faint single seeds.

    Returns None if no arm has both metrics. Names are in a legend: arms often share a corner of the plot, where names
    beside the marks would cover each other.
    """
    found = [(arm, arm.estimates.get("harmful_score"), arm.estimates.get("finetune_accuracy")) for arm in report.arms]
    marks = [
        _Mark(arm, harm, gain, (harm.mean, gain.mean), _MARKERS[index % len(_MARKERS)])
        for index, (arm, harm, gain) in enumerate(found)
        if harm is not None and gain is not None and harm.mean is not None and gain.mean is not None
    ]
    if not marks:
        return None
    with drawing(820, max(460, 80 + 19 * len(marks))) as figure:
        axes = figure.add_subplot()
        share_axis(axes, "x")
        share_axis(axes, "y")
        axes.grid(visible=True)
        axes.tick_params(length=0)
        axes.set_xlabel("harmful score (lower is better)")
        axes.set_ylabel("fine-tune accuracy (higher is better)")
        axes.set_title("↖ better: less harm, more accuracy", color=BLUE)
        for mark in marks:
            _draw_mark(axes, mark, ORANGE if mark.arm.name == report.reference else mark.color)
        legend = axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=11, borderaxespad=0)
        for text, mark in zip(legend.get_texts(), marks, strict=True):
            text.set_fontweight("bold" if mark.arm.on_front else "normal")
        described = "; ".join(
            f"{one_line(m.arm.name, 40)} harm {percent(m.mean[0])} %, accuracy {percent(m.mean[1])} %"
            for m in marks[:20]
        )
        return svg(figure, "front", f"Harmful score against fine-tune accuracy, mean over seeds: {described}.")


def _draw_mark(axes: Axes, mark: _Mark, color: str) -> None:
    for x, y in mark.seeds:
        axes.plot([mark.mean[0], x], [mark.mean[1], y], color=color, alpha=0.25, linewidth=0.7)
        axes.plot([x], [y], marker="o", markersize=3.5, color=color, alpha=0.4, markeredgewidth=0)
    for (x0, y0), (x1, y1) in mark.intervals:
        axes.plot([x0, x1], [y0, y1], color=color, alpha=0.55, linewidth=1.1)
    axes.plot(
        [mark.mean[0]],
        [mark.mean[1]],
        marker=mark.shape,
        markersize=9,
        markerfacecolor=color if mark.arm.comparable else PAPER,
        markeredgecolor=color,
        markeredgewidth=1.4,
        linestyle="none",
        zorder=3,
        clip_on=False,
        label=mark.name,
    )


# ---- layers --------------------------------------------------------------------------------------------------------

_MOST_ROWS = 24


def layer_map(arm: Arm, patch: PatchSummary, quantity: str, name: str) -> str:
    """Draw one cell per module, with kinds of module as rows and layers as columns; dots mark changed modules.

    Args:
        arm: The arm of the patch.
        patch: The patch.
        quantity: `similarity` or `shrinkage`.
        name: Prefix of the identifiers in this figure, unique within the page.
    """
    import numpy
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm

    kinds, columns, cells = module_grid(patch.modules)
    values = [getattr(effect, quantity) for effects in cells.values() for effect in effects]
    low = min(0.0, -1.0 if min(values) < 0 else 0.0)
    high = max(1.0, *values)
    grid = numpy.full((len(kinds), len(columns)), numpy.nan)
    for (row, column), effects in cells.items():
        grid[row, column] = fmean(getattr(effect, quantity) for effect in effects)
    wide = len(columns) > 16
    with drawing(760 if wide else 370, 74 + 17 * max(4, len(kinds))) as figure:
        axes = figure.add_subplot()
        edges = numpy.linspace(low, high, 11)
        colors = colormaps["cividis"].resampled(10)
        norm = BoundaryNorm(edges, 10)
        painted = numpy.asarray(colors(norm(numpy.nan_to_num(grid))))
        _paint_cells(axes, cells, painted)
        axes.set(xlim=(0, len(columns)), ylim=(len(kinds), 0))
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_yticks([i + 0.5 for i in range(len(kinds))], [one_line(kind, 22) for kind in kinds], fontsize=9)
        every = max(1, -(-len(columns) // 16))
        ticks = range(0, len(columns), every)
        axes.set_xticks([i + 0.5 for i in ticks], [columns[i] for i in ticks], fontsize=9)
        axes.set_xlabel("layer")
        axes.set_title(f"{quantity}, 0 = {_ZERO_MEANS[quantity]}", fontsize=10)
        _mark_selected(axes, cells, painted)
        bar = figure.colorbar(
            ScalarMappable(norm, colors), ax=axes, fraction=0.04, pad=0.02, ticks=[low, (low + high) / 2, high]
        )
        bar.ax.tick_params(length=0, labelsize=9)
        bar.ax.set_yticklabels([f"{tick:g}" for tick in (low, round((low + high) / 2, 2), round(high, 2))])
        bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
        return svg(
            figure,
            name,
            f"{quantity} of {len(patch.modules)} modules under {one_line(patch.patch)} in {one_line(arm.name)}: "
            f"mean {fmean(values):.2f}, from {min(values):.2f} to {max(values):.2f}. The table below has every value.",
        )


_ZERO_MEANS = {"similarity": "orthogonal update", "shrinkage": "update removed"}


def _paint_cells(axes: Axes, cells: Iterable[tuple[int, int]], colors: Any) -> None:
    """Draw a square for each cell, all squares of one color as one path: a model has hundreds of cells."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    squares: dict[tuple[float, ...], list[Path]] = {}
    for row, column in cells:
        corners = [(column, row), (column + 1, row), (column + 1, row + 1), (column, row + 1), (column, row)]
        squares.setdefault(tuple(colors[row][column]), []).append(Path(corners, closed=True))
    for color, paths in squares.items():
        axes.add_patch(PathPatch(Path.make_compound_path(*paths), facecolor=color, edgecolor=PAPER, linewidth=0.8))


def _mark_selected(axes: Axes, cells: Mapping[tuple[int, int], Sequence[ModuleEffect]], colors: Any) -> None:
    """Draw a dot in each changed cell, with the share of seeds (and modules) that changed as its area."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    dots: dict[tuple[str, float], list[tuple[float, float]]] = {}
    for (row, column), effects in cells.items():
        part = sum(e.n_selected for e in effects) / sum(e.n_seeds for e in effects)
        if part:
            red, green, blue = (float(channel) for channel in colors[row][column][:3])
            light = 0.3 * red + 0.59 * green + 0.11 * blue > 0.5
            size = 4.5 * part**0.5
            dots.setdefault(("black" if light else "white", size), []).append((column + 0.5, row + 0.5))
    for (color, size), places in dots.items():  # a short line with round ends is a dot
        ends = Path(
            [(x + shift, y) for x, y in places for shift in (0, 0.002)], [Path.MOVETO, Path.LINETO] * len(places)
        )
        ends.should_simplify = False
        axes.add_patch(PathPatch(ends, edgecolor=color, facecolor="none", linewidth=size, capstyle="round"))


def module_grid(
    modules: Sequence[ModuleEffect],
) -> tuple[list[str], list[str], dict[tuple[int, int], list[ModuleEffect]]]:
    """Return kinds, layers, and the modules at each (kind, layer).

    The first number in a module's name is its layer; the part after it is its kind. If there are too many kinds for a
    figure (for example with experts), further numbers are replaced by `*` and a cell is the mean of its modules.
    """
    found = [(*_kind_and_layer(effect.module), effect) for effect in modules]
    if len({kind for kind, _, _ in found}) > _MOST_ROWS:
        found = [(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", kind), layer, effect) for kind, layer, effect in found]
    kinds = list(dict.fromkeys(kind for kind, _, _ in found))
    layers = sorted({layer for _, layer, _ in found}, key=lambda layer: (layer == "", len(layer), layer))
    cells: dict[tuple[int, int], list[ModuleEffect]] = {}
    for kind, layer, effect in found:
        cells.setdefault((kinds.index(kind), layers.index(layer)), []).append(effect)
    return kinds, [layer or "none" for layer in layers], cells


def _kind_and_layer(module: str) -> tuple[str, str]:
    parts = module.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    return (module, "") if at is None else (".".join(parts[at + 1 :]) or module, parts[at])


# ---- training ------------------------------------------------------------------------------------------------------

_LINES = {
    "loss": (INK, "-", "loss"),
    "finetuning_loss": (ORANGE, "-", "fine-tuning loss"),
    "alignment_loss": (BLUE, "--", "alignment loss"),
    "watch/alignment_loss": (BLUE, ":", "held-out alignment loss"),
    "drift": (GRAY, "-", "drift ‖w − anchor‖"),
    "watch/refusal_margin": (BLUE, "-", "refusal margin, nats"),
}


def training_curves(training: Training, highest_loss: float, name: str) -> str:
    """Draw the losses against the step, by phase if phases alternate, and other quantities in panels below.

    Args:
        training: The training.
        highest_loss: Top of the loss axis, equal for all figures so that they can be compared.
        name: Prefix of the identifiers in this figure, unique within the page.
    """
    separate = {quantity: training.curves[quantity] for quantity in SEPARATE if quantity in training.curves}
    losses = {quantity: by_seed for quantity, by_seed in training.curves.items() if quantity not in SEPARATE}
    by_phase = any(quantity in losses for quantity in BY_PHASE)
    if by_phase:
        # The overall loss alternates between the losses of the two phases.
        losses.pop("loss", None)
    with drawing(370, 200 + 100 * len(separate)) as figure:
        shape = figure.subplots(
            1 + len(separate),
            1,
            sharex=True,
            squeeze=False,
            height_ratios=[2, *[1] * len(separate)] if separate else None,
        )
        panels: list[Axes] = [row[0] for row in shape]
        for quantity, by_seed in losses.items():
            _draw_curve(panels[0], quantity, by_seed)
        panels[0].set_ylim(0, highest_loss * 1.05)
        panels[0].set_title("loss by phase" if by_phase else "loss", fontsize=10)
        if len(losses) > 1:
            panels[0].legend(frameon=False, fontsize=9, handlelength=1.6, loc="upper right")
        for panel, (quantity, by_seed) in zip(panels[1:], separate.items(), strict=True):
            _draw_curve(panel, quantity, by_seed)
            panel.set_title(_LINES[quantity][2], fontsize=10)
            if quantity == "drift":
                panel.set_ylim(bottom=0)
            else:
                panel.axhline(0, color=GRAY, linewidth=0.8)
        for panel in panels:
            panel.grid(visible=True, axis="y")
            panel.tick_params(length=0)
        panels[-1].set_xlabel("optimizer step")
        ends = "; ".join(
            f"{_LINES[q][2]} ends at {fmean(points[-1][1] for points in by_seed.values()):.3g}"
            for q, by_seed in training.curves.items()
        )
        return svg(figure, name, f"Training of {join_names(training.arms)}, mean over seeds: {ends}.")


def _draw_curve(axes: Axes, quantity: str, by_seed: Mapping[int, Points]) -> None:
    color, style, title = _LINES[quantity]
    runs = list(by_seed.values())
    if len(runs) > 1:
        for points in runs:
            axes.plot(*zip(*points, strict=True), color=color, alpha=0.25, linewidth=0.8)
    logged = [dict(points) for points in runs]
    steps = sorted(set.intersection(*(set(one) for one in logged)))
    means = [fmean(one[step] for one in logged) for step in steps]
    axes.plot(steps, means, color=color, linestyle=style, linewidth=1.6, label=title)
