"""The plots, as SVG that takes its colors from the page: harm against accuracy, and the curves of training.

Drawn by matplotlib in stand-in colors, each of which becomes a CSS variable, so that one picture serves light, dark
and print. Text stays text. Equal reports give equal bytes.
"""

from __future__ import annotations

import io
import itertools
import re
import warnings
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from stayaligned.report.labels import Box, place_labels
from stayaligned.report.text import one_line, visible
from stayaligned.report.values import Arm, Curve, Estimate, Report, Training

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Stand-in color → what the page's style sheet calls it.
_COLORS = {
    "ink": "#010203",
    "muted": "#010204",
    "line": "#010205",
    "paper": "#010206",
    "blue": "#010207",
    "orange": "#010208",
    "green": "#010209",
    "faint": "#01020a",
}
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "stayaligned",
    "svg.id": None,
    "font.family": "DejaVu Sans",
    "font.size": 10.0,
    "text.parse_math": False,
    "axes.unicode_minus": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _COLORS["line"],
    "axes.labelcolor": _COLORS["ink"],
    "axes.linewidth": 0.8,
    "text.color": _COLORS["ink"],
    "xtick.color": _COLORS["line"],
    "xtick.labelcolor": _COLORS["muted"],
    "ytick.color": _COLORS["line"],
    "ytick.labelcolor": _COLORS["muted"],
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}
_DPI = 72
_BINS = 150
_LABEL_LIMIT = 26


# ---- harm against accuracy -----------------------------------------------------------------------------------------


def front_plot(report: Report, *, width: float, height: float, name: str) -> str | None:
    """Harmful score against fine-tune accuracy, an arm a mark with its intervals, its seeds faint behind it.

    None if no arm has both. Sizes in CSS pixels; `name` keeps the ids of several pictures on one page apart.
    """
    arms = [arm for arm in report.arms if _place(arm) is not None]
    if not arms:
        return None
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_SETTINGS), warnings.catch_warnings():
        # The page's fonts draw the text; matplotlib's own need not have every letter of a label.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI)
        axes = figure.subplots()
        figure.subplots_adjust(left=52 / width, right=1 - 14 / width, bottom=46 / height, top=1 - 14 / height)
        _front_axes(axes)
        for arm in arms:
            _mark(axes, arm, report.reference)
        _front_line(axes, arms)
        _label(figure, axes, arms)
        return _svg(figure, name, "Scatter plot of harmful score against fine-tune accuracy")


def _place(arm: Arm) -> tuple[float, float] | None:
    harm, accuracy = arm.estimates.get("harmful_score"), arm.estimates.get("finetune_accuracy")
    if harm is None or accuracy is None or harm.mean is None or accuracy.mean is None:
        return None
    return 100 * harm.mean, 100 * accuracy.mean


def _front_axes(axes: Axes) -> None:
    axes.set_xlim(-4, 104)
    axes.set_ylim(-4, 104)
    axes.set_xticks(range(0, 101, 20))
    axes.set_yticks(range(0, 101, 20))
    axes.grid(color=_COLORS["faint"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel("Harmful score, %   (← better)")
    axes.set_ylabel("Fine-tune accuracy, %   (better →)")


def _mark(axes: Axes, arm: Arm, reference: str | None) -> None:
    x, y = _place(arm) or (0.0, 0.0)
    color, shape = _look(arm, reference)
    harm, accuracy = arm.estimates["harmful_score"], arm.estimates["finetune_accuracy"]
    by_seed = {seed.seed: seed.value for seed in accuracy.seeds}
    pairs = [(s.value, by_seed.get(s.seed)) for s in harm.seeds]
    seeds = [(100 * a, 100 * b) for a, b in pairs if a is not None and b is not None]
    if len(seeds) > 1:
        axes.scatter([a for a, _ in seeds], [b for _, b in seeds], s=12, color=color, alpha=0.35, linewidths=0)
    style: dict[str, Any] = {"color": color, "linewidth": 1.0, "alpha": 0.55}
    if harm.low is not None and harm.high is not None:
        axes.plot([100 * harm.low, 100 * harm.high], [y, y], **style)
    if accuracy.low is not None and accuracy.high is not None:
        axes.plot([x, x], [100 * accuracy.low, 100 * accuracy.high], **style)
    face = color if arm.comparable else "none"
    axes.plot([x], [y], shape, markersize=8, color=color, markerfacecolor=face, markeredgewidth=1.4, zorder=4)


def _look(arm: Arm, reference: str | None) -> tuple[str, str]:
    if arm.name == reference:
        return _COLORS["orange"], "s"
    if not arm.comparable:
        return _COLORS["muted"], "D"
    return (_COLORS["blue"], "o") if arm.on_front else (_COLORS["muted"], "o")


def _front_line(axes: Axes, arms: Sequence[Arm]) -> None:
    """Steps between the arms on the front: no arm lies above and left of them."""
    front = sorted(place for arm in arms if arm.on_front and (place := _place(arm)) is not None)
    if len(front) > 1:
        xs, ys = [x for x, _ in front], [y for _, y in front]
        axes.step(xs, ys, where="post", color=_COLORS["blue"], linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)


def _label(figure: Figure, axes: Axes, arms: Sequence[Arm]) -> None:
    texts = [one_line(arm.name, _LABEL_LIMIT) for arm in arms]
    places = [_place(arm) or (0.0, 0.0) for arm in arms]
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    sizes: list[tuple[float, float]] = []
    for text in texts:
        probe = axes.text(0, 0, text, fontsize=10.5)
        box = probe.get_window_extent(renderer)
        sizes.append((box.width, box.height))
        probe.remove()
    points = [_pixels(axes, place) for place in places]
    obstacles = [Box(x - 6, y - 6, 12, 12) for x, y in points]
    obstacles += [bar for arm, place in zip(arms, places, strict=True) for bar in _bars(axes, arm, place)]
    bounds = axes.get_window_extent(renderer)
    area = Box(bounds.x0 + 2, bounds.y0 + 2, bounds.width - 4, bounds.height - 4)
    boxes = place_labels(points, sizes, obstacles, area)
    for arm, text, (x, y), box in zip(arms, texts, points, boxes, strict=True):
        middle = (box.x + box.width / 2, box.y + box.height / 2)
        near = (min(max(x, box.x), box.x + box.width), min(max(y, box.y), box.y + box.height))
        if (near[0] - x) ** 2 + (near[1] - y) ** 2 > 13**2:
            leader = axes.transData.inverted().transform([(x, y), near])
            axes.plot(leader[:, 0], leader[:, 1], color=_COLORS["line"], linewidth=0.8, zorder=2)
        at = axes.transData.inverted().transform(middle)
        weight = "bold" if arm.on_front else "normal"
        axes.text(
            float(at[0]), float(at[1]), text, fontsize=10.5, ha="center", va="center", fontweight=weight, zorder=5
        )


def _pixels(axes: Axes, place: tuple[float, float]) -> tuple[float, float]:
    x, y = axes.transData.transform(place)
    return float(x), float(y)


def _bars(axes: Axes, arm: Arm, place: tuple[float, float]) -> list[Box]:
    def span(estimate: Estimate) -> tuple[float, float]:
        return 100 * (estimate.low or 0.0), 100 * (estimate.high or 0.0)

    boxes: list[Box] = []
    if arm.estimates["harmful_score"].low is not None:
        low, high = span(arm.estimates["harmful_score"])
        (x0, y), (x1, _) = axes.transData.transform([(low, place[1]), (high, place[1])])
        boxes.append(Box(x0, y - 1, x1 - x0, 2))
    if arm.estimates["finetune_accuracy"].low is not None:
        low, high = span(arm.estimates["finetune_accuracy"])
        (x, y0), (_, y1) = axes.transData.transform([(place[0], low), (place[0], high)])
        boxes.append(Box(x - 1, y0, 2, y1 - y0))
    return boxes


# ---- training ------------------------------------------------------------------------------------------------------

_CURVE_LOOKS: Mapping[str, tuple[str, str, str]] = {
    "loss": ("loss", "muted", "-"),
    "alignment_loss": ("alignment", "blue", "-"),
    "finetuning_loss": ("fine-tuning", "orange", "-"),
    "drift": ("drift", "green", "-"),
}


def training_plot(training: Training, *, name: str, top_loss: float, top_drift: float, last_step: float) -> str:
    """Loss by state against the optimizer step, and below it the drift where it was logged.

    Thin lines are seeds, thick ones their mean. The scales are given, so that neighboring pictures compare.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    losses = [curve for curve in training.curves if curve.quantity != "drift"]
    if len(losses) > 1:
        # Where the loss is known by state, the mixture of both says nothing more.
        losses = [curve for curve in losses if curve.quantity != "loss"]
    drifts = [curve for curve in training.curves if curve.quantity == "drift"]
    rows = bool(losses) + bool(drifts)
    height = 60 + 120 * rows
    with rc_context(_SETTINGS):
        figure = Figure(figsize=(360 / _DPI, height / _DPI), dpi=_DPI)
        panels = figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
        figure.subplots_adjust(left=0.13, right=0.84, bottom=40 / height, top=1 - 10 / height, hspace=0.16)
        for axes, curves, top, label in zip(
            panels,
            [group for group in (losses, drifts) if group],
            [t for t, group in ((top_loss, losses), (top_drift, drifts)) if group],
            [label for label, group in (("loss", losses), ("drift", drifts)) if group],
            strict=True,
        ):
            _curves(axes, curves, top, last_step)
            axes.set_ylabel(label)
        panels[-1].set_xlabel("optimizer step")
        arms = ", ".join(one_line(arm) for arm in training.arms)
        return _svg(figure, name, f"Loss and drift against the optimizer step: {arms}")


def _curves(axes: Axes, curves: Sequence[Curve], top: float, last_step: float) -> None:
    axes.set_xlim(0, last_step)
    axes.set_ylim(0, top)
    axes.locator_params(axis="y", nbins=4)
    axes.locator_params(axis="x", nbins=5)
    axes.grid(color=_COLORS["faint"], linewidth=0.8)
    axes.set_axisbelow(True)
    ends: list[tuple[float, str, str]] = []
    for curve in curves:
        label, color, line = _CURVE_LOOKS[curve.quantity]
        lines = [thin(points, _BINS) for _, points in curve.seeds]
        for points in lines if len(lines) > 1 else []:
            axes.plot(*zip(*points, strict=True), color=_COLORS[color], linewidth=0.7, alpha=0.35)
        mean = thin(mean_curve([points for _, points in curve.seeds]), _BINS)
        axes.plot(*zip(*mean, strict=True), line, color=_COLORS[color], linewidth=1.8)
        if len(curves) > 1:
            ends.append((mean[-1][1], label, color))
    # Labels at the lines' ends, pushed apart where the lines meet.
    gap, floor = top * 0.13, -top
    for value, label, color in sorted(ends):
        floor = max(min(value, top), floor + gap)
        axes.annotate(label, (last_step, floor), xytext=(5, 0), textcoords="offset points", va="center",
                      color=_COLORS[color], fontsize=9, annotation_clip=False)  # fmt: skip


def mean_curve(lines: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[float, float]]:
    """The mean at each step that every line has; the first line where they share none."""
    values = [dict(line) for line in lines]
    steps = sorted(set.intersection(*(set(line) for line in values)))
    return [(step, fmean(line[step] for line in values)) for step in steps] or list(lines[0])


def thin(points: Sequence[tuple[float, float]], limit: int) -> list[tuple[float, float]]:
    """At most `limit` points: neighbors are averaged, so that a long log keeps its shape and the page its size."""
    size = -(-len(points) // limit)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(fmean(x for x, _ in group), fmean(y for _, y in group)) for group in groups]


def training_plots(report: Report) -> list[tuple[Training, str]]:
    """Each training with its picture, all on the same scales."""
    points = [
        (curve.quantity, step, value)
        for training in report.trainings
        for curve in training.curves
        for _, line in curve.seeds
        for step, value in line
    ]
    loss = sorted(value for quantity, _, value in points if quantity != "drift")
    # The first steps' loss may tower over the rest: the scale shows 99 % of what was logged.
    top_loss = 1.1 * loss[int(0.99 * (len(loss) - 1))] if loss else 1.0
    top_drift = 1.1 * max((value for quantity, _, value in points if quantity == "drift"), default=1.0)
    last_step = max((step for _, step, _ in points), default=1.0)
    names = (f"training{number}" for number in itertools.count())
    return [
        (
            training,
            training_plot(
                training,
                name=name,
                top_loss=top_loss if top_loss > 0 else 1.0,
                top_drift=top_drift if top_drift > 0 else 1.0,
                last_step=max(last_step, 1.0),
            ),
        )
        for training, name in zip(report.trainings, names, strict=False)
    ]


# ---- matplotlib's SVG → the page's ---------------------------------------------------------------------------------

_TAG = re.compile(r"<[^>]*>")
_HEADER = re.compile(r"<\?xml.*?\?>|<!DOCTYPE.*?>|<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", re.DOTALL)
_FONT = re.compile(r"'DejaVu Sans'[^;\"]*")


def _svg(figure: Figure, name: str, description: str) -> str:
    """The figure as an `<svg>` element: no header, ids of its own, variables for colors, the page's fonts."""
    stream = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(
            stream, format="svg", dpi=_DPI, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    # matplotlib escapes < and > in text and attributes, so whatever stands between them is markup of its own.
    body = _TAG.sub(lambda tag: _restyle(tag[0], name), _HEADER.sub("", stream.getvalue())).strip()
    label = visible(description).replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    root = re.compile(r'<svg\b[^>]*viewBox="([^"]*)"[^>]*>')
    return root.sub(
        lambda match: (
            f'<svg role="img" aria-label="{label}" viewBox="{match[1]}" xmlns:xlink="http://www.w3.org/1999/xlink" '
            'stroke-linejoin="round" stroke-linecap="butt">'
        ),
        body,
        count=1,
    )


def _restyle(tag: str, name: str) -> str:
    tag = re.sub(r'\bid="', f'id="{name}-', tag)
    tag = re.sub(r'href="#', f'href="#{name}-', tag).replace("url(#", f"url(#{name}-")
    tag = _FONT.sub("var(--sans)", tag)
    for variable, color in _COLORS.items():
        tag = tag.replace(color, f"var(--{variable})")
    return tag
