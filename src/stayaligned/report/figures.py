"""The pictures of a report, as SVG for its page."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from stayaligned.core.text import one_line
from stayaligned.report.drawing import BLUE, GRAY, INK, ORANGE, PAPER, drawing, share_axis, svg
from stayaligned.report.labels import Box, Point, along, place
from stayaligned.report.texts import listed, percent
from stayaligned.report.training import BY_PHASE, NO_LOSSES
from stayaligned.report.values import Arm, Estimate, ModuleEffect, PatchSummary, Points, Report, Training

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# ---- harm against accuracy -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Spot:
    """An arm's place in the picture."""

    arm: Arm
    harm: Estimate
    gain: Estimate
    at: Point
    """(mean harm, mean accuracy)."""

    @property
    def color(self) -> str:
        """Blue on the front, gray for controls."""
        return BLUE if self.arm.on_front else INK if self.arm.comparable and not self.arm.control else GRAY

    @property
    def seeds(self) -> list[Point]:
        """The same of every seed that has both; none for one seed, which is the mean itself."""
        pairs = [(m.value, n.value) for seed, m in self.harm.by_seed.items() if (n := self.gain.by_seed.get(seed))]
        points = [(x, y) for x, y in pairs if x is not None and y is not None]
        return points if len(points) > 1 else []

    @property
    def intervals(self) -> list[tuple[Point, Point]]:
        """The ends of the two intervals, as far as there are any."""
        (x, y), harm, gain = self.at, self.harm, self.gain
        across = [((harm.low, y), (harm.high, y))] if harm.low is not None and harm.high is not None else []
        along = [((x, gain.low), (x, gain.high))] if gain.low is not None and gain.high is not None else []
        return across + along


def harm_against_accuracy(report: Report) -> tuple[str, list[str]] | None:
    """Mean harm and mean accuracy of every arm with intervals, single seeds faint; None where no arm has both.

    Returns:
        The picture, and the names of arms for which it has no room.
    """
    spots = [
        _Spot(arm, harm, gain, (harm.mean, gain.mean))
        for arm in report.arms
        if (harm := arm.estimates.get("harmful_score")) is not None
        and (gain := arm.estimates.get("finetune_accuracy")) is not None
        and harm.mean is not None
        and gain.mean is not None
    ]
    if not spots:
        return None
    with drawing(720, 500) as figure:
        axes = figure.add_subplot()
        share_axis(axes, "x")
        share_axis(axes, "y")
        axes.grid(visible=True)
        axes.tick_params(length=0)
        axes.set_xlabel("harmful score (lower is better)")
        axes.set_ylabel("fine-tune accuracy (higher is better)")
        axes.set_title("↖ better: less harm, more accuracy", color=BLUE)
        for spot in spots:
            _draw_spot(axes, spot, ORANGE if spot.arm.name == report.reference else spot.color)
        unnamed = _name_spots(figure, axes, spots)
        described = "; ".join(
            f"{one_line(s.arm.name, 40)} harm {percent(s.at[0])} %, accuracy {percent(s.at[1])} %" for s in spots[:20]
        )
        picture = svg(figure, "front", f"Harmful score against fine-tune accuracy, mean over seeds: {described}.")
        return picture, unnamed


def _draw_spot(axes: Axes, spot: _Spot, color: str) -> None:
    for x, y in spot.seeds:
        axes.plot([spot.at[0], x], [spot.at[1], y], color=color, alpha=0.25, linewidth=0.7)
        axes.plot([x], [y], marker="o", markersize=3.5, color=color, alpha=0.4, markeredgewidth=0)
    for (x0, y0), (x1, y1) in spot.intervals:
        axes.plot([x0, x1], [y0, y1], color=color, alpha=0.55, linewidth=1.1)
    axes.plot(
        [spot.at[0]],
        [spot.at[1]],
        marker="s" if spot.arm.control else "D" if spot.arm.on_front else "o",
        markersize=8,
        markerfacecolor=color if spot.arm.comparable else PAPER,
        markeredgecolor=color,
        markeredgewidth=1.4,
        zorder=3,
        clip_on=False,
    )


def _name_spots(figure: Figure, axes: Axes, spots: Sequence[_Spot]) -> list[str]:
    """Write every arm's name beside its mark; returns the names for which there is no room."""
    # The layout must stand, and stay, before pixels mean anything.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    texts = [
        axes.text(0, 0, one_line(s.arm.name, 26), fontsize=11, fontweight="bold" if s.arm.on_front else "normal")
        for s in spots
    ]
    sizes = [(extent.width + 4, extent.height + 2) for extent in (text.get_window_extent() for text in texts)]

    def to_pixels(point: Point) -> Point:
        x, y = axes.transData.transform(point)
        return float(x), float(y)

    def to_data(point: Point) -> Point:
        x, y = axes.transData.inverted().transform(point)
        return float(x), float(y)

    lines = [(to_pixels(start), to_pixels(end)) for spot in spots for start, end in spot.intervals]
    frame = axes.get_window_extent()
    places = place(
        [to_pixels(spot.at) for spot in spots],
        sizes,
        inside=Box(frame.x0, frame.y0, frame.x1, frame.y1),
        marker=6.0,
        clutter=[to_pixels(seed) for spot in spots for seed in spot.seeds]
        + [point for line in lines for point in along(line, 10.0)],
    )
    missing: list[str] = []
    for text, found, spot in zip(texts, places, spots, strict=True):
        if found is None:
            text.remove()
            missing.append(spot.arm.name)
            continue
        text.set_position(to_data((found.box.left + 2, found.box.bottom + 3)))
        if found.leader is not None:
            (x0, y0), (x1, y1) = (to_data(end) for end in found.leader)
            axes.plot([x0, x1], [y0, y1], color=INK, linewidth=0.6, alpha=0.6, zorder=2)
    return missing


# ---- layers --------------------------------------------------------------------------------------------------------

_MOST_ROWS = 24


def layer_map(arm: Arm, patch: PatchSummary, quantity: str, name: str) -> str:
    """One cell a module: kinds of module down, layers across. A dot marks what the patch changed.

    Args:
        arm: whose patch it is.
        patch: the patch.
        quantity: `similarity` or `shrinkage`.
        name: tells this figure's identifiers from those of others.
    """
    import numpy
    from matplotlib import colormaps
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
        image = axes.pcolormesh(
            numpy.ma.masked_invalid(grid), cmap=colors, norm=BoundaryNorm(edges, 10), edgecolors=PAPER, linewidth=0.8
        )
        axes.invert_yaxis()
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_yticks([i + 0.5 for i in range(len(kinds))], [one_line(kind, 22) for kind in kinds], fontsize=9)
        every = max(1, -(-len(columns) // 16))
        ticks = range(0, len(columns), every)
        axes.set_xticks([i + 0.5 for i in ticks], [columns[i] for i in ticks], fontsize=9)
        axes.set_xlabel("layer")
        axes.set_title(f"{quantity}, 0 = {_ZERO_MEANS[quantity]}", fontsize=10)
        _mark_selected(axes, cells, numpy.asarray(colors(BoundaryNorm(edges, 10)(numpy.nan_to_num(grid)))))
        bar = figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02, ticks=[low, (low + high) / 2, high])
        bar.ax.tick_params(length=0, labelsize=9)
        bar.ax.set_yticklabels([f"{tick:g}" for tick in (low, round((low + high) / 2, 2), round(high, 2))])
        bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
        return svg(
            figure,
            name,
            f"{quantity} of {len(patch.modules)} modules under {one_line(patch.patch)} in {one_line(arm.name)}: "
            f"mean {fmean(values):.2f}, from {min(values):.2f} to {max(values):.2f}. The table below has every value.",
        )


_ZERO_MEANS = {"similarity": "update points elsewhere", "shrinkage": "update gone"}


def _mark_selected(axes: Axes, cells: Mapping[tuple[int, int], Sequence[ModuleEffect]], colors: Any) -> None:
    """A dot in each changed cell, its area the share of seeds (and modules) in which it was."""
    for (row, column), effects in cells.items():
        part = sum(e.n_selected for e in effects) / sum(e.n_seeds for e in effects)
        if part:
            red, green, blue = (float(channel) for channel in colors[row][column][:3])
            light = 0.3 * red + 0.59 * green + 0.11 * blue > 0.5
            size = 4.5 * part**0.5
            axes.plot(
                column + 0.5, row + 0.5, marker="o", markersize=size, color="black" if light else "white", linewidth=0
            )


def module_grid(
    modules: Sequence[ModuleEffect],
) -> tuple[list[str], list[str], dict[tuple[int, int], list[ModuleEffect]]]:
    """Kinds, layers, and the modules at each (kind, layer).

    The first number in a module's name is its layer, what follows its kind. Where there are too many kinds for a
    picture (experts, say), further numbers are left out and a cell is the mean of its modules.
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
    """Loss against step, by phase where phases alternate, and below it what is no loss; seeds faint, their mean strong.

    Args:
        training: the training.
        highest_loss: top of the loss axis, shared by all figures so that they can be compared.
        name: tells this figure's identifiers from those of others.
    """
    below = {quantity: training.curves[quantity] for quantity in NO_LOSSES if quantity in training.curves}
    losses = {quantity: by_seed for quantity, by_seed in training.curves.items() if quantity not in NO_LOSSES}
    by_phase = any(quantity in losses for quantity in BY_PHASE)
    if by_phase:
        # The overall loss alternates between the two that are drawn.
        losses.pop("loss", None)
    with drawing(370, 200 + 100 * len(below)) as figure:
        shape = figure.subplots(
            1 + len(below), 1, sharex=True, squeeze=False, height_ratios=[2, *[1] * len(below)] if below else None
        )
        panels: list[Axes] = [row[0] for row in shape]
        for quantity, by_seed in losses.items():
            _draw_curve(panels[0], quantity, by_seed)
        panels[0].set_ylim(0, highest_loss * 1.05)
        panels[0].set_title("loss by phase" if by_phase else "loss", fontsize=10)
        if len(losses) > 1:
            panels[0].legend(frameon=False, fontsize=9, handlelength=1.6, loc="upper right")
        for panel, (quantity, by_seed) in zip(panels[1:], below.items(), strict=True):
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
        return svg(figure, name, f"Training of {listed(training.arms)}, mean over seeds: {ends}.")


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
