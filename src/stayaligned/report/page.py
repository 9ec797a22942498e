"""The report as one HTML page without network access or foreign code, with all model text escaped."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from stayaligned.report import texts
from stayaligned.report.completions import clipper, completion_table, disputed
from stayaligned.report.layers import count_changed, layer_table, middle_and_range
from stayaligned.report.prose import INTERVALS
from stayaligned.report.training import SEPARATE
from stayaligned.report.values import Arm, CategoryRate, MetricKind, Report, Role
from stayaligned.report.verdicts import is_shown
from stayaligned.report.words import NEVER_CLAIMED

if TYPE_CHECKING:
    from markupsafe import Markup

_TEMPLATES = Path(__file__).parent / "templates"


def html_text(report: Report) -> str:
    """Render the report as an HTML page. Equal reports give equal bytes.

    The content security policy of the page forbids all requests, and all scripts except the page's own, allowed by
    hash. The template engine escapes all text from results, and control characters are made visible.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # These files belong to this package and are inserted unescaped: CSS and scripts do not decode HTML escapes.
    script = "".join((_TEMPLATES / name).read_text(encoding="utf-8") for name in ("sort.js", "answers.js"))
    style = (_TEMPLATES / "style.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("report.html.j2").render(
        report=report,
        style=Markup(style),  # noqa: S704
        script=Markup(script),  # noqa: S704
        script_hash=digest,
        texts=texts,
        intervals=INTERVALS,
        never_claimed=NEVER_CLAIMED,
        sizes={kind.name: _common_size(report, kind) for kind in report.metrics},
        widest=_WIDEST,
        scope=_scope(report),
        cautions=(cautions := _cautions(report)),
        cautions_in_short=_shorten(cautions),
        arms_by_role={role: [arm for arm in report.arms if arm.role == role] for role in get_args(Role)},
        role_tags={"reference": "reference", "control": "control", "context": "for orientation", "competing": ""},
        is_shown=is_shown,
        overview_metrics=_overview_metrics(report),
        mixture=_mixture(report),
        configurations={arm.name: _yaml(arm.experiment) for arm in report.arms},
        clip=clipper(report),
        layers=[(arm, patch) for arm in report.arms for patch in arm.patches if patch.modules],
        layer_table=layer_table,
        middle_and_range=middle_and_range,
        count_changed=count_changed,
        judged_twice=any(arm.agreements or arm.other_judges for arm in report.arms),
        disputed=disputed(report),
        category_tables=_category_tables(report),
        every_answer=Markup(completion_table(report) or ""),  # noqa: S704
        second_readings=any(arm.other_judges for arm in report.arms),
        **_figures(report),
    )


def _finalize(value: object) -> object:
    """Make control characters visible in everything that a template prints, except in markup of this package."""
    return texts.visible(value) if type(value) is str else value


def _figures(report: Report) -> dict[str, Any]:
    from markupsafe import Markup

    from stayaligned.report.figures import harm_against_accuracy, training_curves

    def inline(svg: str) -> Markup:
        return Markup(svg)  # noqa: S704 names in it were escaped by `attribute` or by matplotlib

    losses = [
        value
        for training in report.trainings
        for quantity, by_seed in training.curves.items()
        if quantity not in SEPARATE
        for points in by_seed.values()
        for _, value in points
    ]
    return {
        "front": [
            (size, inline(picture))
            for size in ("wide", "narrow")
            if (picture := harm_against_accuracy(report, size)) is not None
        ],
        "curves": [
            (training, inline(training_curves(training, max(losses, default=1.0), f"training{i}")))
            for i, training in enumerate(report.trainings)
        ],
    }


_WIDEST = 7
"""Metrics in one table, so that it fits a screen; more metrics get tables of their own."""


def _scope(report: Report) -> str:
    """Return what the numbers cover, in one line."""
    seeds = {len(arm.seeds) for arm in report.arms}
    least, most = min(seeds), max(seeds)
    count = f"{least} seed{'s' if least > 1 else ''}" if least == most else f"{least} to {most} seeds"
    controls = sum(arm.role == "control" for arm in report.arms)
    arms = len(report.arms) - controls
    of = f"{arms} arm{'s' if arms > 1 else ''}" + (
        f" and {controls} control{'s' if controls > 1 else ''}" if controls else ""
    )
    parts = [
        f"{of}, {count} each" if len(report.arms) > 1 else count,
        *([f"judge: {texts.one_line(report.judge, 80)}"] if report.judge else []),
        "intervals at 95 %",
    ]
    return " · ".join(parts)


def _cautions(report: Report) -> list[tuple[str, str]]:
    """Return every caution and note of the results, with the results that have it (empty for all)."""
    return [*((caution, "") for caution in (NEVER_CLAIMED[0], *report.cautions)), *report.notes]


def _shorten(cautions: Sequence[tuple[str, str]]) -> str:
    """Return the first words of the cautions, as many as fit in one line."""
    short = ""
    for caution, _ in cautions:
        words = re.split(r"[:;.(](?=\s|$)|\s\(", texts.one_line(caution, 120))[0].strip()
        if len(short) + len(words) > _SHORT:
            return f"{short}; …"
        short = f"{short}; {words[:1].lower()}{words[1:]}" if short else words
    return short


_SHORT = 160
"""Characters of the line that stands for all cautions."""


_OVERVIEW = {
    "finetune_accuracy": "Accuracy",
    "skills_kept": "Skills",
    "over_refusal": "Over-refusal",
}
"""Measures of usefulness for the overview, the best first, with short titles."""
_HARM_SHORT = {"harmful_score": "Harm", "worst_harm": "Worst harm"}


def _overview_metrics(report: Report) -> list[tuple[MetricKind, str]]:
    """Return harm, the worst harm if it was measured, and the first usefulness that some arm has, with short titles."""
    kinds = {kind.name: kind for kind in report.metrics}
    useful = [(name, short) for name, short in _OVERVIEW.items() if name in kinds]
    return [(kinds[name], short) for name, short in (*_HARM_SHORT.items(), *useful[:1]) if name in kinds]


def _common_size(report: Report, kind: MetricKind) -> str | None:
    """Return the sample size that all arms share; None if they differ."""
    sizes = {texts.sample_size(arm.estimates[kind.name]) for arm in report.arms if kind.name in arm.estimates}
    return sizes.pop() if len(sizes) == 1 else None


@dataclass(frozen=True, slots=True)
class _CategoryTable:
    """The rates on the categories of one prompt set: the fewer of arms and categories are the columns."""

    title: str
    first: str
    """What the rows are."""
    columns: tuple[tuple[str, int | None], ...]
    """Arm or category; with a category, the number of completions if all arms have the same."""
    rows: tuple[tuple[tuple[str, int | None], tuple[CategoryRate | None, ...]], ...]


def _category_tables(report: Report) -> list[_CategoryTable]:
    """Return the harmful score by category of harmful prompts, and over-refusal by category of benign prompts."""
    wanted = (
        ("harmful", "harmful_score", "Harmful completions of the harmful prompts"),
        ("benign", "over_refusal", "Refused benign prompts"),
    )
    tables: list[_CategoryTable] = []
    for prompt_set, name, title in wanted:
        found = {
            (arm.name, rate.category): rate
            for arm in report.arms
            for rate in arm.categories
            if (rate.prompt_set, rate.name) == (prompt_set, name)
        }
        arms = [(arm, None) for arm in dict.fromkeys(arm for arm, _ in found)]
        sizes: dict[str, set[int]] = {}
        for (_, category), rate in found.items():
            sizes.setdefault(category, set()).add(rate.n)
        categories = [(category, min(n) if len(n) == 1 else None) for category, n in sizes.items()]
        if len(categories) <= len(arms):
            cells = [(arm, tuple(found.get((arm[0], category)) for category, _ in categories)) for arm in arms]
            tables.append(_CategoryTable(title, "Arm", tuple(categories), tuple(cells)))
        elif categories:
            cells = [(category, tuple(found.get((arm, category[0])) for arm, _ in arms)) for category in categories]
            tables.append(_CategoryTable(title, "Category", tuple(arms), tuple(cells)))
    return [table for table in tables if table.rows]


def _mixture(report: Report) -> list[tuple[Arm, list[tuple[str, str, float]]]]:
    """Return (CSS class, title, mean share) of the three outcomes on harmful prompts, for arms that have all three."""
    parts = (
        ("refusal_rate", "refuse", "refused"),
        ("other_rate", "other", "neither"),
        ("harmful_score", "harm", "harm"),
    )
    rows: list[tuple[Arm, list[tuple[str, str, float]]]] = []
    for arm in report.arms:
        means = [(css, title, e.mean) for name, css, title in parts if (e := arm.estimates.get(name)) is not None]
        known = [(css, title, mean) for css, title, mean in means if mean is not None]
        if len(known) == len(parts):
            rows.append((arm, known))
    return rows


def _yaml(value: Any) -> str:
    import yaml

    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)
