"""The report as one HTML page: no network, no foreign code, every word of a model inert."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stayaligned.core.records import Outcome, PromptSet
from stayaligned.core.text import one_line
from stayaligned.evaluation.results import Evidence
from stayaligned.report import texts
from stayaligned.report.prose import INTERVALS
from stayaligned.report.training import NO_LOSSES
from stayaligned.report.values import Answer, Arm, CategoryRate, MetricKind, PatchSummary, Question, Report
from stayaligned.report.words import NEVER_CLAIMED

if TYPE_CHECKING:
    from markupsafe import Markup

_TEMPLATES = Path(__file__).parent / "templates"
_SHOWN_CHARACTERS = 400
_KEPT_CHARACTERS = 20_000


def html_text(report: Report) -> str:
    """The page. Equal reports give equal bytes.

    Its content security policy forbids every request and every script but the one that sorts tables, named by its
    hash. What results say is escaped by the template engine, and its control characters are made visible.
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
    # These files are the project's own: they go in as they are, since CSS and scripts know no HTML escapes.
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
        changed=_changed,
        judged_twice=any(arm.agreements or arm.other_judges for arm in report.arms),
        disputed=_disputed(report),
        category_columns=_category_columns(report),
        category_cell=_category_cell,
        every_answer=Markup(_inert_json(_every_answer(report))),  # noqa: S704
        second_readings=any(arm.other_judges for arm in report.arms),
        **_figures(report),
    )


def _finalize(value: object) -> object:
    """Make control characters visible in all that a template prints, unless it is markup of this project."""
    return texts.visible(value) if type(value) is str else value


def _figures(report: Report) -> dict[str, Any]:
    from markupsafe import Markup

    from stayaligned.report.figures import harm_against_accuracy, layer_map, training_curves

    def inline(svg: str) -> Markup:
        return Markup(svg)  # noqa: S704 drawn here; names in it went through `attribute` or matplotlib's own escaping

    front = harm_against_accuracy(report)
    losses = [
        value
        for training in report.trainings
        for quantity, by_seed in training.curves.items()
        if quantity not in NO_LOSSES
        for points in by_seed.values()
        for _, value in points
    ]
    return {
        "front": None if front is None else inline(front[0]),
        "unnamed": [] if front is None else front[1],
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
    """An answer as far as a page shows it."""

    start: str
    rest: str
    n_left_out: int
    """Characters beyond what the page keeps."""


def _clip(text: str) -> Clipped:
    return Clipped(
        text[:_SHOWN_CHARACTERS], text[_SHOWN_CHARACTERS:_KEPT_CHARACTERS], max(0, len(text) - _KEPT_CHARACTERS)
    )


def _common_size(report: Report, kind: MetricKind) -> str | None:
    """The sample size that all arms share, to be said once; None where they differ."""
    sizes = {texts.sample_size(arm.estimates[kind.name]) for arm in report.arms if kind.name in arm.estimates}
    return sizes.pop() if len(sizes) == 1 else None


def _inert_json(value: object) -> str:
    """JSON for a script element that is no script: nothing in it can end the element or begin another."""
    import json

    return json.dumps(value, ensure_ascii=True).replace("<", "\\u003c").replace(">", "\\u003e")


def _every_answer(report: Report) -> dict[str, Any] | None:
    """Titles and rows of the table of all answers; None where no evidence was given."""
    if not report.evidence_rows:
        return None
    judges = list(dict.fromkeys(judge for row in report.evidence_rows for judge in row.evidence.outcomes))
    numbers = list(dict.fromkeys(judge for row in report.evidence_rows for judge in row.evidence.judge_scores))
    outcomes = [*judges, *(f"{judge}: its number" for judge in numbers)]
    titles = ["prompt", "arm", "seed", "asked for", "category", *outcomes, "score", "degenerate"]

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


def _disputed(report: Report) -> list[Question]:
    """Questions with the answers on which judges differ, as far as the results kept them."""
    found = [
        replace(question, answers=tuple(a for a in question.answers if _differ(a))) for question in report.questions
    ]
    return [question for question in found if question.answers]


def _differ(answer: Answer) -> bool:
    """Whether two judges read an answer differently; one that can't tell a refusal is asked about harm alone."""
    said = {outcome for outcome in answer.outcomes.values() if outcome is not None}
    if Outcome.SAFE in said:
        return Outcome.HARM in said
    return len(said) > 1


def _category_columns(report: Report) -> list[tuple[PromptSet, str, str]]:
    """(prompt set, category, metric) of the rates that are shown: harm on harmful prompts, refusals of benign ones."""
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
    """For each arm that has all three: (outcome, title, mean share) of its answers to harmful prompts."""
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

    return yaml.safe_dump(_plain(value), sort_keys=False, allow_unicode=True)


def _plain(value: Any) -> Any:
    """Mappings and sequences as the plain ones that YAML knows."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _changed(patch: PatchSummary) -> str:
    """How many modules a patch changed, in words."""
    changed = sum(module.n_selected > 0 for module in patch.modules)
    always = sum(module.n_selected == module.n_seeds for module in patch.modules)
    total = len(patch.modules)
    return f"{changed} of {total} changed" + (f", {always} of them in every seed" if always != changed else "")
