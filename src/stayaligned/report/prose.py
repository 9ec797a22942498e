"""The report as Markdown with GitHub's tables, for pull requests and release notes; without model output."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from stayaligned.core.text import markdown, percent
from stayaligned.report.texts import bounds, describe_seeds, p_value, sample_size, unscored_count
from stayaligned.report.values import WORST_HARM, Arm, Estimate, MetricKind, Report
from stayaligned.report.words import NEVER_CLAIMED


def markdown_text(report: Report) -> str:
    """Render the report as Markdown, without figures and completions; report.html has these."""
    return "\n".join(_lines(report)) + "\n"


def _lines(report: Report) -> Iterator[str]:
    yield f"# {markdown(report.title)}"
    yield from ("", markdown(report.summary, 2000), "")
    for finding in report.findings:
        yield f"- {markdown(finding, 2000)}"
    if report.gate is not None:
        yield f"- **Gate: {report.gate.answer}**, {markdown(report.gate.limit)}. {markdown(report.gate.sentence, 2000)}"
    yield from ("", "## Limitations of the numbers", "")
    for caution in (NEVER_CLAIMED[0], *report.cautions):
        yield f"- {markdown(caution, 2000)}"
    for note, owners in report.notes:
        yield f"- **{markdown(note, 500)}**{f' ({markdown(owners, 500)})' if owners else ''}"
    yield from ("", "## Verdicts", "", *(_verdict(arm) for arm in report.arms))
    yield from ("", "## Arms", "", *_main_table(report), "")
    if report.reference is not None:
        yield from (f"## Differences from {markdown(report.reference)}", "", *_difference_table(report), "")
    yield from ("## Every seed", "", *_seed_table(report), "")
    if any(arm.agreements for arm in report.arms):
        yield from ("## Agreement of judges", "", *_agreement_table(report), "")
    yield from ("## Versions and inputs", "", "| | value | results |", "|---|---|---|")
    for fact in report.facts:
        for value, owners in fact.values:
            yield f"| {markdown(fact.name)} | {markdown(value)} | {markdown(owners) or 'all'} |"
    yield from ("", "## How to read this", "")
    for kind in report.metrics:
        better = "higher" if kind.higher_is_better else "lower"
        yield f"- **{markdown(kind.title)}** ({better} is better): {markdown(kind.definition, 500)}"
    for sentence in (*INTERVALS, *NEVER_CLAIMED[1:]):
        yield f"- {sentence}"
    yield from ("", "`report.html` has figures, training curves and completions; `results.csv` has every value.")


INTERVALS = (
    "Intervals are at 95 %. For two or more seeds they cover other seeds and other prompts: the error of the mean adds "
    "the spread of the seeds and the spread of the prompts that they share. For one seed, marked †, they cover other "
    "prompts but not other seeds.",
    "A difference is taken on the prompts that both arms have, seed by seed; its mean and its interval are of the same "
    "prompts. Copies and near copies of a prompt count as one prompt in the interval.",
    "Two families of tests are fixed in advance, and corrected each for itself (Holm): the harmful score of the "
    "competing arms against the reference arm, and the harmful score of each patch against its controls. All else is "
    "secondary: its p-values are not corrected and show nothing by themselves. One seed shows no difference.",
    "Unscored completions are excluded from the rates and counted separately.",
)
"""Explanation of the intervals, shared by HTML and Markdown."""


def _table(head: Sequence[str], rows: Iterator[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|---|{'---:|' * (len(head) - 1)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def _main_table(report: Report) -> Iterator[str]:
    head = ["arm", *(f"{markdown(k.title)} {'↑' if k.higher_is_better else '↓'} %" for k in report.metrics)]
    yield from _table(
        head,
        (
            [_label(arm, report), *(_estimate(arm.estimates.get(k.name), k) for k in report.metrics)]
            for arm in report.arms
        ),
    )
    yield ""
    front = " ◆: on the front of harm against accuracy, by the means." if len(report.arms) > 1 else ""
    judge = f" Judge: {markdown(report.judge)}." if report.judge else ""
    yield f"Mean over seeds (95 % interval; prompts × seeds).{judge}{front}"


def _verdict(arm: Arm) -> str:
    return f"- **{markdown(arm.name)}**: {markdown(arm.verdict.sentence, 2000)}"


def _label(arm: Arm, report: Report) -> str:
    marks = [
        *(["reference"] if arm.name == report.reference else []),
        *(["control"] if arm.control else []),
        *([] if arm.comparable else ["other task or attack"]),
    ]
    suffix = f" ({', '.join(marks)})" if marks else ""
    return f"{'◆ ' if arm.on_front else ''}{markdown(arm.name)}{suffix}"


def _estimate(estimate: Estimate | None, kind: MetricKind) -> str:
    if estimate is None:
        return "not measured"
    if estimate.mean is None:
        return f"n/a ({unscored_count(estimate)})"
    dagger = "†" if estimate.interval == "prompts" else ""
    details = [
        estimate.prompt_set if kind is WORST_HARM else "",
        f"{bounds(estimate.low, estimate.high, scale=estimate.scale)}{dagger}",
        sample_size(estimate),
        *([unscored_count(estimate)] if estimate.n_unscored else []),
    ]
    return f"**{percent(estimate.mean, scale=estimate.scale)}** ({'; '.join(part for part in details if part)})"


def _difference_table(report: Report) -> Iterator[str]:
    kinds = [k for k in report.metrics if any(k.name in arm.differences for arm in report.arms)]

    def cell(arm: Arm, name: str) -> str:
        difference = arm.differences.get(name)
        if difference is None or difference.paired.mean is None:
            return "n/a"
        scale = arm.estimates[name].scale
        interval = bounds(difference.paired.low, difference.paired.high, signed=True, scale=scale)
        mean = percent(difference.paired.mean, signed=True, scale=scale)
        p = "" if difference.p_value is None else f"p {p_value(difference.p_value)}"
        details = "; ".join(part for part in (interval, describe_seeds(difference), p) if part)
        return f"{f'**{mean}**' if difference.resolved else mean} ({details})"

    yield from _table(
        ["arm", *(markdown(k.title) for k in kinds)],
        ([markdown(arm.name), *(cell(arm, k.name) for k in kinds)] for arm in report.arms if arm.differences),
    )
    yield ""
    yield (
        "In percentage points, on the prompts that both arms have. Bold: a harmful score of a competing arm with p "
        "below 0.05 after Holm's correction over these arms. All other differences are secondary: their p-values are "
        "not corrected."
    )


def _seed_table(report: Report) -> Iterator[str]:
    rows = (
        [
            markdown(arm.name),
            str(seed),
            *(_seed_value(arm.estimates.get(k.name), seed) for k in report.metrics),
        ]
        for arm in report.arms
        for seed in arm.seeds
    )
    yield from _table(["arm", "seed", *(markdown(k.title) for k in report.metrics)], rows)


def _seed_value(estimate: Estimate | None, seed: int) -> str:
    metric = None if estimate is None else estimate.by_seed.get(seed)
    return "–" if metric is None else percent(metric.value, scale=metric.scale)


def _agreement_table(report: Report) -> Iterator[str]:
    rows = (
        [
            markdown(arm.name),
            markdown(" / ".join(pair.judges)),
            pair.prompt_set,
            str(pair.n),
            f"{percent(pair.agreement)} %" if pair.agreement is not None else "n/a",
            "undefined" if pair.kappa is None else f"{pair.kappa:.2f}",
            str(len(pair.disputed)),
        ]
        for arm in report.arms
        for pair in arm.agreements
    )
    yield from _table(["arm", "judges", "prompts", "n", "agreement", "kappa", "disputed"], rows)
