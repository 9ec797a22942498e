"""Report → Markdown, CSV, and the terminal's table."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from stayaligned.report.text import csv_cell, markdown, number, one_line, percent
from stayaligned.report.values import Arm, Estimate, MetricKind, Report
from stayaligned.report.wording import NEVER_CLAIMED, difference_in_words

if TYPE_CHECKING:
    from rich.table import Table

_CSV_COLUMNS = ("arm", "seed", "metric", "judge", "value", "n", "n_unscored", "low", "high", "higher_is_better")


def render_csv(report: Report) -> str:
    """Long form: one row per arm, seed, metric and judge. An empty `value` is unscored, never 0."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(_CSV_COLUMNS)
    for arm in report.arms:
        for estimate in (*arm.estimates.values(), *arm.other_judges):
            for seed in estimate.seeds:
                numbers = (seed.value, seed.n, seed.n_unscored, seed.low, seed.high)
                writer.writerow(
                    [csv_cell(arm.name), seed.seed, csv_cell(estimate.metric), csv_cell(estimate.judge)]
                    + ["" if value is None else value for value in numbers]
                    + [str(estimate.higher_is_better).lower()]
                )
    return stream.getvalue()


def render_markdown(report: Report) -> str:
    """The answer, the cautions and the main table, for a pull request or a release note.

    Answers of models are left out: a forge would turn what they mention into links and notifications.
    """
    lines = [f"# {markdown(report.title)}", "", f"**{markdown(report.answer)}**", ""]
    if report.findings:
        lines += [markdown(" ".join(report.findings)), ""]
    lines += [f"- {markdown(caution)}" for caution in report.cautions]
    lines += ["", *_markdown_table(report, report.metrics, _full_cell), ""]
    lines.append("Percent: mean over seeds [95 % interval; Student's over seeds, or one seed's prompts].")
    if report.reference is not None:
        lines += [
            "",
            f"Difference from {markdown(report.reference)} in percentage points, paired by seed [95 % interval]:",
            "",
            *_markdown_table(report, report.metrics, _difference_cell),
        ]
    pairs = [(arm, pair) for arm in report.arms for pair in arm.agreements]
    if pairs:
        lines += ["", "| Arm | Judges | Prompts | Agree | κ | n |", "|---|---|---|---:|---:|---:|"]
        for arm, pair in pairs:
            kappa = "undefined" if pair.kappa is None else f"{pair.kappa:.2f}"
            judges = ", ".join(markdown(judge, 40) for judge in pair.judges)
            lines.append(
                f"| {markdown(arm.name, 80)} | {judges} | {pair.prompt_set} | {percent(pair.agreement)} | {kappa} "
                f"| {pair.n} |"
            )
    lines += ["", NEVER_CLAIMED, ""]
    return "\n".join(lines)


def _markdown_table(
    report: Report, kinds: Sequence[MetricKind], cell: Callable[[Arm, MetricKind], str]
) -> Iterable[str]:
    titles = [f"{markdown(kind.title)} {'↑' if kind.higher_is_better else '↓'}" for kind in kinds]
    yield f"| {' | '.join(['Arm', *titles])} |"
    yield f"|---{'|---:' * len(kinds)}|"
    for arm in report.arms:
        yield f"| {' | '.join([markdown(arm.name, 80), *(cell(arm, kind) for kind in kinds)])} |"


def _full_cell(arm: Arm, kind: MetricKind) -> str:
    estimate = arm.estimates.get(kind.name)
    if estimate is None:
        return "not measured"
    unscored = f" ({estimate.n_unscored} unscored)" if estimate.n_unscored and estimate.mean is not None else ""
    return short(estimate) + unscored


def _difference_cell(arm: Arm, kind: MetricKind) -> str:
    difference = arm.differences.get(kind.name)
    if difference is None:
        return ""
    return difference_in_words(difference.mean, difference.low, difference.high)


def short(estimate: Estimate) -> str:
    """`41.2 [37.1, 64.2]` in percent; `n/a (0 of 150 scored)` where there is nothing."""
    if estimate.mean is None:
        return f"n/a (0 of {estimate.n_unscored} scored)"
    if estimate.low is None or estimate.high is None:
        return number(estimate.mean)
    return f"{number(estimate.mean)} [{number(estimate.low)}, {number(estimate.high)}]"


def terminal_table(report: Report) -> Table:
    """The main table for a terminal: means in percent with their intervals."""
    from rich.table import Table
    from rich.text import Text

    # Text, not markup: a label like [red] is a label.
    table = Table(title=Text(one_line(report.title)), title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column("Arm", overflow="fold")
    kinds = [kind for kind in report.metrics if kind.name != "refusal_rate"]
    for kind in kinds:
        table.add_column(Text(f"{one_line(kind.title)} {'↑' if kind.higher_is_better else '↓'}"), justify="right")
    for arm in report.arms:
        cells = [arm.estimates.get(kind.name) for kind in kinds]
        name = Text(one_line(arm.name), style="bold" if arm.on_front else "")
        table.add_row(name, *(Text("not measured" if cell is None else short(cell)) for cell in cells))
    seeds = sorted({len(arm.seeds) for arm in report.arms})
    counted = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    table.caption = Text(
        f"percent, mean over {counted} seed(s) [95 % interval]; bold: on the front of harm and accuracy"
    )
    table.caption_justify = "left"
    return table
