"""The figures of a report, as SVG."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Literal, NamedTuple

from stayaligned.core.text import one_line, percent
from stayaligned.report.drawing import BLUE, GRAY, INK, PAPER, drawing, share_axis, svg
from stayaligned.report.texts import join_names
from stayaligned.report.training import BY_PHASE, SEPARATE
from stayaligned.report.values import Arm, Estimate, Points, Report, Training

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# ---- harm against accuracy -----------------------------------------------------------------------------------------

Point = tuple[float, float]

_SIZES = {"wide": (560, 430, 24), "narrow": (350, 370, 18)}
"""Width and height in pixels, and characters of a line of a name, for a screen and for a phone."""
_NEAR = 14
"""Distance in pixels below which marks touch and share a label."""
_MOST_NAMES = 8
"""Names in one label; further names are counted."""


class _Box(NamedTuple):
    """A rectangle in pixels, with y upwards."""

    x0: float
    y0: float
    x1: float
    y1: float


@dataclass(frozen=True, slots=True)
class _Mark:
    """One arm in the plot of harm against accuracy."""

    arm: Arm
    harm: Estimate
    gain: Estimate
    mean: Point
    """Mean harm and mean accuracy."""
    style: tuple[str, str, bool]
    """Shape, color, and whether the mark is filled."""

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


def harm_against_accuracy(report: Report, size: Literal["wide", "narrow"] = "wide") -> str | None:
    """Plot mean harm against mean accuracy of every arm, with single seeds, and intervals of the arms that compete.

    Controls are marked and not named: they crowd the corner of the undefended arm. Returns None if no arm has both
    metrics.
    """
    marks = _marks(report)
    if not marks:
        return None
    width, height, characters = _SIZES[size]
    with drawing(width, height) as figure:
        axes = figure.add_subplot()
        share_axis(axes, "x")
        share_axis(axes, "y")
        axes.grid(visible=True)
        axes.tick_params(length=0)
        axes.set_xlabel("harmful score (lower is better)")
        axes.set_ylabel("fine-tune accuracy (higher is better)")
        axes.set_title("↖ better", color=BLUE)
        for mark in marks:
            _draw_mark(axes, mark)
        _draw_names(figure, axes, marks, characters)
        described = "; ".join(
            f"{one_line(m.arm.name, 40)} harm {percent(m.mean[0])} %, accuracy {percent(m.mean[1])} %"
            for m in marks[:20]
        )
        return svg(figure, f"front-{size}", f"Harmful score against fine-tune accuracy, mean over seeds: {described}.")


def _marks(report: Report) -> list[_Mark]:
    found = [(arm, arm.estimates.get("harmful_score"), arm.estimates.get("finetune_accuracy")) for arm in report.arms]
    return [
        _Mark(arm, harm, gain, (harm.mean, gain.mean), _style(arm, report.reference))
        for arm, harm, gain in found
        if harm is not None and gain is not None and harm.mean is not None and gain.mean is not None
    ]


def _style(arm: Arm, reference: str | None) -> tuple[str, str, bool]:
    if arm.name == reference:
        return "s", INK, True
    if arm.control:
        return "x", GRAY, False
    return ("o", BLUE, True) if arm.comparable else ("o", INK, False)


def _draw_mark(axes: Axes, mark: _Mark) -> None:
    shape, color, filled = mark.style
    for x, y in mark.seeds:
        axes.plot([mark.mean[0], x], [mark.mean[1], y], color=color, alpha=0.2, linewidth=0.7)
        axes.plot([x], [y], marker="o", markersize=3, color=color, alpha=0.35, markeredgewidth=0)
    for (x0, y0), (x1, y1) in [] if mark.arm.control else mark.intervals:
        axes.plot([x0, x1], [y0, y1], color=color, alpha=0.45, linewidth=1)
    axes.plot(
        [mark.mean[0]],
        [mark.mean[1]],
        marker=shape,
        markersize=6 if mark.arm.control else 8,
        markerfacecolor=color if filled else PAPER,
        markeredgecolor=color,
        markeredgewidth=1.5,
        linestyle="none",
        zorder=3 if mark.arm.control else 4,
        clip_on=False,
    )


def _draw_names(figure: Figure, axes: Axes, marks: Sequence[_Mark], characters: int) -> None:
    """Write the names of the marks, one label for marks that touch, where each covers the least of what is there."""
    figure.draw_without_rendering()  # fixes the layout, and with it the pixels of a point
    at: dict[str, Point] = {mark.arm.name: tuple(axes.transData.transform(mark.mean)) for mark in marks}
    taken = [_Box(x - 6, y - 6, x + 6, y + 6) for x, y in at.values()]
    room = _Box(*axes.get_window_extent().extents)
    for group in _touching([mark for mark in marks if not mark.arm.control], at):
        x, y = (fmean(at[mark.arm.name][axis] for mark in group) for axis in (0, 1))
        names = [line for m in group[:_MOST_NAMES] for line in textwrap.wrap(one_line(m.arm.name, 60), characters)]
        if len(group) > _MOST_NAMES:
            names.append(f"and {len(group) - _MOST_NAMES} more")
        label = axes.annotate("\n".join(names), (x, y), xycoords="figure pixels", fontsize=11, linespacing=1.15)
        size = label.get_window_extent()
        others = [at[mark.arm.name] for mark in marks if mark not in group and not mark.arm.control]
        box, away = _best_place((size.width, size.height), (x, y), others, taken, room)
        taken.append(box)
        label.set_position((box.x0, box.y0))
        if away:
            nearest = (min(max(x, box.x0), box.x1), min(max(y, box.y0), box.y1))
            axes.annotate("", (x, y), nearest, "figure pixels", "figure pixels", arrowprops=_LEADER)


_LEADER = {"arrowstyle": "-", "color": GRAY, "linewidth": 0.7, "shrinkA": 1, "shrinkB": 5}


def _touching(marks: Sequence[_Mark], at: Mapping[str, Point]) -> list[list[_Mark]]:
    """Group marks that touch each other."""
    groups: list[list[_Mark]] = []
    for mark in marks:
        near = [g for g in groups if any(math.dist(at[mark.arm.name], at[m.arm.name]) < _NEAR for m in g)]
        groups = [g for g in groups if g not in near] + [[m for g in near for m in g] + [mark]]
    return [[mark for mark in marks if mark in group] for group in groups]


def _best_place(
    size: Point, at: Point, others: Sequence[Point], taken: Sequence[_Box], room: _Box
) -> tuple[_Box, bool]:
    """Return the box beside a point that covers the least of what is taken, and whether it is far from the point.

    A box that is nearer to another mark than to its own would name the wrong one.
    """
    width, height = size
    places: list[tuple[float, _Box, bool]] = []
    for distance in (9, 18, 30, 45, 65, 90, 120):
        for dx, dy in _SIDES:
            x = at[0] + int(dx) * distance - (1 - dx) / 2 * width
            y = at[1] + dy * distance - (1 - dy) / 2 * height
            box = _Box(x, y, x + width, y + height)
            covered = sum(_common_area(box, other) for other in taken)
            outside = width * height - _common_area(box, room)
            mistaken = sum(_gap(box, other) < _gap(box, at) for other in others)
            places.append((100 * outside + 10 * covered + 500 * mistaken + distance, box, distance > 9))
    _, box, away = min(places, key=lambda place: place[0])
    return box, away


_SIDES = (
    *((1.0, 0), (-1.0, 0), (0.0, -1), (0.0, 1), (1.0, -1), (-1.0, -1), (1.0, 1), (-1.0, 1)),
    *((dx, dy) for dy in (1, -1) for dx in (0.5, -0.5, 0.9, -0.9)),
)
"""Positions of a box relative to its point, as (right, up): 1 is right of or above it, -1 left of or below."""


def _gap(box: _Box, point: Point) -> float:
    """Return the distance from a box to a point."""
    return math.hypot(max(box.x0 - point[0], 0.0, point[0] - box.x1), max(box.y0 - point[1], 0.0, point[1] - box.y1))


def _common_area(a: _Box, b: _Box) -> float:
    width, height = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
    return max(0.0, width) * max(0.0, height)


# ---- training ------------------------------------------------------------------------------------------------------

_LINES = {
    "loss": (INK, "-", "loss"),
    "finetuning_loss": (INK, "-", "fine-tuning loss"),
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
