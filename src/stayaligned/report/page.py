"""The report as one HTML page without network access or foreign code, with all model text escaped."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stayaligned.core.records import Outcome, PromptSet
from stayaligned.core.text import one_line
from stayaligned.evaluation.results import Evidence
from stayaligned.report import texts
from stayaligned.report.prose import INTERVALS
from stayaligned.report.training import SEPARATE
from stayaligned.report.values import Arm, ArmCompletion, CategoryRate, ComparedPrompt, MetricKind, PatchSummary, Report
from stayaligned.report.words import NEVER_CLAIMED

if TYPE_CHECKING:
    from markupsafe import Markup

_TEMPLATES = Path(__file__).parent / "templates"
_SHOWN_CHARACTERS = 400
_MAX_CHARACTERS = 20_000


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
        mixture=_mixture(report),
        configurations={arm.name: _yaml(arm.experiment) for arm in report.arms},
        clip=_clip,
        changed=_count_changed,
        judged_twice=any(arm.agreements or arm.other_judges for arm in report.arms),
        disputed=_disputed(report),
        category_columns=_category_columns(report),
        category_cell=_category_cell,
        every_answer=Markup(_inert_json(_completion_table(report))),  # noqa: S704
        second_readings=any(arm.other_judges for arm in report.arms),
        **_figures(report),
    )


def _finalize(value: object) -> object:
    """Make control characters visible in everything that a template prints, except in markup of this package."""
    return texts.visible(value) if type(value) is str else value


def _figures(report: Report) -> dict[str, Any]:
    from markupsafe import Markup

    from stayaligned.report.figures import harm_against_accuracy, layer_map, training_curves

    def inline(svg: str) -> Markup:
        return Markup(svg)  # noqa: S704 names in it were escaped by `attribute` or by matplotlib

    front = harm_against_accuracy(report)
    losses = [
        value
        for training in report.trainings
        for quantity, by_seed in training.curves.items()
        if quantity not in SEPARATE
        for points in by_seed.values()
        for _, value in points
    ]
    return {
        "front": None if front is None else inline(front),
        "curves": [
            (training, inline(training_curves(training, max(losses, default=1.0), f"training{i}")))
            for i, training in enumerate(report.trainings)
        ],
        "layers": [
            (arm, patch, [inline(layer_map(arm, patch, q, f"{q}{i}-{j}")) for q in ("similarity", "shrinkage")])
            for i, arm in enumerate(report.arms)
            for j, patch in enumerate(arm.patches)
            if patch.modules
        ],
    }


@dataclass(frozen=True, slots=True)
class Clipped:
    """A text split for display."""

    start: str
    """The part that is always shown."""
    rest: str
    """The part that is shown on demand."""
    n_left_out: int
    """Number of characters that the page omits."""


def _clip(text: str) -> Clipped:
    return Clipped(
        text[:_SHOWN_CHARACTERS], text[_SHOWN_CHARACTERS:_MAX_CHARACTERS], max(0, len(text) - _MAX_CHARACTERS)
    )


def _common_size(report: Report, kind: MetricKind) -> str | None:
    """Return the sample size that all arms share; None if they differ."""
    sizes = {texts.sample_size(arm.estimates[kind.name]) for arm in report.arms if kind.name in arm.estimates}
    return sizes.pop() if len(sizes) == 1 else None


def _inert_json(value: object) -> str:
    """Return JSON for a data `<script>` element, encoded so that it cannot close the element or open another."""
    import json

    return json.dumps(value, ensure_ascii=True).replace("<", "\\u003c").replace(">", "\\u003e")


def _completion_table(report: Report) -> dict[str, Any] | None:
    """Return titles and rows of the table of all completions; None without evidence."""
    if not report.evidence_rows:
        return None
    judges = list(dict.fromkeys(judge for row in report.evidence_rows for judge in row.evidence.outcomes))
    numbers = list(dict.fromkeys(judge for row in report.evidence_rows for judge in row.evidence.judge_scores))
    outcomes = [*judges, *(f"{judge}: score" for judge in numbers)]
    titles = ["prompt", "arm", "seed", "prompt set", "category", *outcomes, "score", "degenerate"]

    def outcome(row: Evidence, judge: str) -> str | None:
        if judge not in row.outcomes:
            return None
        found = row.outcomes[judge]
        return "unscored" if found is None else found.value

    rows = [
        [
            one_line(row.evidence.id, 60),
            one_line(row.arm, 60),
            row.seed,
            row.evidence.prompt_set,
            one_line(row.evidence.category, 60),
            *(outcome(row.evidence, judge) for judge in judges),
            *(row.evidence.judge_scores.get(judge) for judge in numbers),
            row.evidence.score,
            None if row.evidence.degenerate is None else "yes" if row.evidence.degenerate else "no",
        ]
        for row in report.evidence_rows
    ]
    return {"columns": [one_line(title, 40) for title in titles], "rows": rows}


def _disputed(report: Report) -> list[ComparedPrompt]:
    """Return the prompts whose sample completions judges dispute, with those completions."""
    found = [
        replace(prompt, completions=tuple(c for c in prompt.completions if _is_disputed(c)))
        for prompt in report.prompts
    ]
    return [prompt for prompt in found if prompt.completions]


def _is_disputed(completion: ArmCompletion) -> bool:
    """Whether judges gave different outcomes; with a judge that does not distinguish refusals, only harm counts."""
    found = {outcome for outcome in completion.outcomes.values() if outcome is not None}
    if Outcome.SAFE in found:
        return Outcome.HARM in found
    return len(found) > 1


def _category_columns(report: Report) -> list[tuple[PromptSet, str, str]]:
    """Return (prompt set, category, metric) of the rates to show: harm on harmful and refusals of benign prompts."""
    shown = {"harmful": "harmful_score", "benign": "over_refusal"}
    return list(
        dict.fromkeys(
            (rate.prompt_set, rate.category, rate.name)
            for arm in report.arms
            for rate in arm.categories
            if shown.get(rate.prompt_set) == rate.name
        )
    )


def _category_cell(arm: Arm, column: tuple[PromptSet, str, str]) -> CategoryRate | None:
    return next((rate for rate in arm.categories if (rate.prompt_set, rate.category, rate.name) == column), None)


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


def _count_changed(patch: PatchSummary) -> str:
    """Describe how many modules a patch changed."""
    changed = sum(module.n_selected > 0 for module in patch.modules)
    always = sum(module.n_selected == module.n_seeds for module in patch.modules)
    total = len(patch.modules)
    return f"{changed} of {total} changed" + (f", {always} in every seed" if always != changed else "")
