"""The report as a table for the terminal, and every value as CSV."""

from __future__ import annotations

import csv
import io
from typing import TYPE_CHECKING

from stayaligned.core.text import one_line, percent
from stayaligned.evaluation.rows import RESULT_COLUMNS
from stayaligned.report.texts import csv_cell, unscored_count
from stayaligned.report.values import WORST_HARM, Arm, Estimate, MetricKind, Report
from stayaligned.report.verdicts import is_shown

if TYPE_CHECKING:
    from rich.table import Table

_SHORT_TITLES = {
    "harmful_score": "harmful",
    "worst_harm": "worst\nharm",
    "refusal_rate": "refused",
    "other_rate": "neither",
    "over_refusal": "over-\nrefusal",
    "finetune_accuracy": "accuracy",
    "skills_kept": "skills",
    "degeneration": "degen.",
}

_OMITTED_WITH_DEGENERATION = ("refusal_rate", "other_rate")
"""Metrics omitted from the terminal table if it has degeneration, so that it fits 80 columns."""


def terminal_table(report: Report) -> Table:
    """Build a table of the arms: means in percent with half the 95 % interval, and harm against the reference arm.

    The table fits 80 columns for short names.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    kinds = [kind for kind in report.metrics if kind.name in _SHORT_TITLES]
    if any(kind.name == "degeneration" for kind in kinds):
        kinds = [kind for kind in kinds if kind.name not in _OMITTED_WITH_DEGENERATION]
    kinds.sort(key=lambda kind: list(_SHORT_TITLES).index(kind.name))
    # Titles and names are passed as Text: rich would read square brackets as markup.
    table = Table(
        title=Text(one_line(report.title)),
        caption=Text(_caption(report)),
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        caption_justify="left",
        title_justify="left",
    )
    table.add_column("arm", overflow="fold")
    for kind in kinds:
        table.add_column(_SHORT_TITLES[kind.name], justify="right")
    if report.reference is not None:
        table.add_column("Δ harm", justify="right")
    for arm in report.arms:
        style = "bold" if is_shown(arm) else "" if arm.comparable else "dim"
        cells = [Text(one_line(arm.name)), *(Text(_cell(arm.estimates.get(k.name)) + _set_name(k, arm)) for k in kinds)]
        if report.reference is not None:
            cells.append(Text(_difference(arm, report.reference)))
        table.add_row(*cells, style=style)
    return table


def _cell(estimate: Estimate | None) -> str:
    if estimate is None:
        return "–"
    if estimate.mean is None or estimate.low is None or estimate.high is None:
        return "\n".join(part for part in (percent(estimate.mean), unscored_count(estimate)) if part)
    # Clipped intervals and intervals over prompts are not symmetric: show the larger side.
    half = max(estimate.mean - estimate.low, estimate.high - estimate.mean)
    return f"{100 * estimate.mean:.1f}±{100 * half:.0f}{'*' if estimate.n_unscored else ''}"


def _set_name(kind: MetricKind, arm: Arm) -> str:
    return f"\n{arm.worst_harm.prompt_set}" if kind is WORST_HARM and arm.worst_harm is not None else ""


def _difference(arm: Arm, reference: str) -> str:
    if arm.name == reference:
        return "ref."
    difference = arm.differences.get("harmful_score")
    if difference is None or difference.paired.mean is None:
        return "–"
    return f"{percent(difference.paired.mean, signed=True)}{' ≠' if difference.resolved else ''}"


def _caption(report: Report) -> str:
    kinds = {e.interval for arm in report.arms for e in arm.estimates.values()}
    parts = ["In %; ± is the larger side of the 95 % interval"]
    parts.append("over prompts" if "seeds" not in kinds else "over seeds and prompts (one seed: over prompts)")
    text = " ".join(parts) + "."
    if report.judge:
        text += f" Judge: {one_line(report.judge)}."
    if any(is_shown(arm) for arm in report.arms):
        text += " Bold: less harm is shown, of a model that works."
    if any(arm.comparable for arm in report.arms) and not all(arm.comparable for arm in report.arms):
        text += " Dim: not fine-tuned on the same task and attack."
    if any(d.resolved for arm in report.arms for d in arm.differences.values()):
        text += " ≠: p below 0.05 after Holm's correction."
    if any(e.n_unscored and e.mean is not None for arm in report.arms for e in arm.estimates.values()):
        text += " *: some completions unscored."
    return text


def csv_text(report: Report) -> str:
    """Render the rows of the report, which are those of `load_results`, as CSV; cells without a value are empty."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, [*RESULT_COLUMNS], lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _csv_value(value) for name, value in row.items()} for row in report.rows)
    return stream.getvalue()


def _csv_value(value: object) -> object:
    if isinstance(value, str):
        return csv_cell(value)
    return "" if value is None else int(value) if isinstance(value, bool) else value
