"""Report → one self-contained HTML page. All text is escaped by the template engine; no script but our own runs."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any

from stayaligned.report import text
from stayaligned.report.plots import front_plot, training_plots
from stayaligned.report.values import Arm, Estimate, MetricKind, ModuleEffect, PatchSummary, Report
from stayaligned.report.wording import NEVER_CLAIMED, difference_in_words, resolved

if TYPE_CHECKING:
    from jinja2 import Environment

_SHOWN_CHARACTERS = 600
_KEPT_CHARACTERS = 20_000
_SAMPLES_AN_ARM = 24
_SPARSE_COLUMNS = 10
"""A layer map with more columns has cells too narrow for numbers; color, the summary and read-aloud text remain."""


@dataclass(frozen=True, slots=True)
class Clipped:
    """A long text in three parts: shown at once, shown on demand, and how much is left out."""

    head: str
    rest: str
    n_left_out: int


@dataclass(frozen=True, slots=True)
class LayerMap:
    """One patch as a grid: a row per kind of module, a column per layer."""

    patch: PatchSummary
    columns: tuple[int | None, ...]
    """Layer numbers; None for the modules outside the numbered layers."""
    rows: tuple[tuple[str, tuple[ModuleEffect | None, ...]], ...]
    """Kind of module, and the module of each column."""

    @property
    def dense(self) -> bool:
        """Whether the cells are too narrow for numbers."""
        return len(self.columns) > _SPARSE_COLUMNS

    @property
    def uniform(self) -> bool:
        """Whether every module fared alike, as under a control: a sentence then says more than a map."""
        return len({(f"{m.similarity:.2f}", f"{m.shrinkage:.2f}", m.n_selected > 0) for m in self.patch.modules}) == 1


def render_html(report: Report) -> str:
    """The page: no request to anywhere, no script or style from outside, the same bytes for the same report."""
    from markupsafe import Markup

    environment = _environment()
    template = environment.get_template("report.html.j2")
    style, script = _resource("report.css"), _resource("sort.js")
    wide = front_plot(report, width=860, height=560, name="front")
    narrow = front_plot(report, width=372, height=470, name="front-narrow")
    return template.render(
        report=report,
        columns=[kind for kind in report.metrics if kind.name != "refusal_rate"],
        sizes={kind.name: _size(report.arms, kind) for kind in report.metrics},
        split=[arm for arm in report.arms if _has_split(arm)],
        pairs=list(dict.fromkeys((p.judges, p.prompt_set) for arm in report.arms for p in arm.agreements)),
        layer_maps=[(arm, [layer_map(patch) for patch in arm.patches]) for arm in report.arms if arm.patches],
        trainings=[(training, Markup(svg)) for training, svg in training_plots(report)],  # noqa: S704
        front=None if wide is None or narrow is None else (Markup(wide), Markup(narrow)),  # noqa: S704
        style=Markup(style),  # noqa: S704
        script=Markup(script),  # noqa: S704
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        never_claimed=NEVER_CLAIMED,
        samples_an_arm=_SAMPLES_AN_ARM,
    )


def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("stayaligned.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Callable[..., Any]] = {
        "visible": text.visible,
        "one_line": text.one_line,
        "number": text.number,
        "percent": text.percent,
        "points": text.points,
        "plain": text.plain,
        "duration": text.duration,
        "clipped": clipped,
        "yaml": _yaml,
    }
    functions: dict[str, Callable[..., Any]] = {
        "resolved": resolved,
        "difference_in_words": difference_in_words,
        "improves": _improves,
        "interval": interval_in_words,
        "bar": _bar,
        "range_of": _range,
    }
    environment.filters.update(filters)
    environment.globals.update(functions)
    return environment


def _resource(name: str) -> str:
    return (resources.files("stayaligned.report") / "templates" / name).read_text(encoding="utf-8")


def interval_in_words(estimate: Estimate) -> str:
    """`[37.1, 64.2]` in percent; `no interval` where there is none."""
    if estimate.low is None or estimate.high is None:
        return "no interval" if estimate.mean is not None else ""
    return f"[{text.number(estimate.low)}, {text.number(estimate.high)}]"


def clipped(content: str) -> Clipped:
    """Foreign text made visible, and cut where it is long: a page must open even if a model wrote a megabyte."""
    kept = text.visible(content[:_KEPT_CHARACTERS])
    left_out = max(0, len(content) - _KEPT_CHARACTERS)
    if len(kept) <= _SHOWN_CHARACTERS and not left_out:
        return Clipped(kept, "", 0)
    return Clipped(kept[:_SHOWN_CHARACTERS], kept[_SHOWN_CHARACTERS:], left_out)


def layer_map(patch: PatchSummary) -> LayerMap:
    """Modules by kind and layer: `model.layers.3.self_attn.q_proj` is layer 3 of `self_attn.q_proj`."""
    cells: dict[str, dict[int | None, ModuleEffect]] = {}
    for effect in patch.modules:
        found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", effect.module)
        layer = int(found[1]) if found is not None else None
        kind = effect.module if found is None else f"{effect.module[: found.start()]}·{effect.module[found.end() :]}"
        cells.setdefault(kind, {})[layer] = effect
    columns = sorted({layer for row in cells.values() for layer in row}, key=lambda layer: (layer is None, layer or 0))
    stems = {kind.partition("·")[0] for kind in cells if "·" in kind}
    # One stack of layers needs no name of its own; an encoder's and a decoder's keep theirs.
    names = {kind: (kind.partition("·")[2] or kind) if len(stems) == 1 else kind.replace("·", ".") for kind in cells}
    rows = tuple((names[kind], tuple(row.get(layer) for layer in columns)) for kind, row in cells.items())
    return LayerMap(patch, tuple(columns), rows)


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low} to {high}"


def _size(arms: Sequence[Arm], kind: MetricKind) -> str:
    """`200 × 3 seeds` if all arms have it alike, else nothing: each cell then says its own."""
    sizes = {tuple(s.n for s in arm.estimates[kind.name].seeds) for arm in arms if kind.name in arm.estimates}
    if len(sizes) != 1 or len(set(next(iter(sizes)))) != 1:
        return ""
    (size,) = sizes
    return f"n = {size[0]}" + (f" × {len(size)} seeds" if len(size) > 1 else "")


def _has_split(arm: Arm) -> bool:
    names = ("refusal_rate", "other_rate", "harmful_score")
    return all(name in arm.estimates and arm.estimates[name].mean is not None for name in names)


def _improves(arm: Arm, kind: MetricKind) -> str:
    """`better` or `worse` where the difference from the reference is resolved; else nothing."""
    if not resolved(arm, kind.name):
        return ""
    return "better" if ((arm.differences[kind.name].mean or 0.0) > 0) == kind.higher_is_better else "worse"


def _bar(estimate: Estimate) -> Mapping[str, str]:
    """Positions in percent of the cell for the mean's mark and the interval's whisker."""
    mean = estimate.mean or 0.0
    low = mean if estimate.low is None else estimate.low
    high = mean if estimate.high is None else estimate.high
    return {"mean": f"{100 * mean:.2f}", "low": f"{100 * low:.2f}", "width": f"{100 * (high - low):.2f}"}


def _yaml(content: Mapping[str, Any]) -> str:
    import yaml

    return text.visible(yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True, width=100))
