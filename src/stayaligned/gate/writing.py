"""A decision as JSON, as JUnit's XML and as Markdown. Names and reasons may hold hostile text."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from stayaligned.core.text import markdown, one_line, visible
from stayaligned.gate.values import Criterion, Decision
from stayaligned.gate.words import bounds_of, judges_disagree, limit_of, points

_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What XML 1.0 forbids even as an entity."""


def to_json(decision: Decision) -> str:
    """The whole decision; `schema_version` is raised when a field changes its meaning."""
    return decision.model_dump_json(indent=2) + "\n"


def to_junit(decision: Decision) -> str:
    """One test case per criterion: a fail is a failure, an undecided one an error.

    Not `skipped`, which CI systems show as passed: undecided is no permission to release.
    """
    answers = [criterion.answer for criterion in decision.criteria]
    suite = ElementTree.Element(
        "testsuite",
        name="stayaligned gate",
        tests=str(len(answers)),
        failures=str(answers.count("fail")),
        errors=str(answers.count("undecided")),
        skipped="0",
    )
    for criterion in decision.criteria:
        case = ElementTree.SubElement(suite, "testcase", classname="stayaligned.gate", name=criterion.name)
        if criterion.answer != "pass":
            kind = "failure" if criterion.answer == "fail" else "error"
            found = ElementTree.SubElement(case, kind, type=criterion.answer, message=_xml(criterion.reason))
            found.text = _xml(_line(criterion))
        else:
            ElementTree.SubElement(case, "system-out").text = _xml(criterion.reason)
    said = [decision.sentence, *remarks(decision)]
    ElementTree.SubElement(suite, "system-out").text = _xml("\n".join(said))
    ElementTree.indent(suite)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(suite, encoding="unicode") + "\n"


def to_markdown(decision: Decision) -> str:
    """For a comment on a pull request: the sentence, a table, and what a reader must know."""
    mark = {"pass": "✅", "fail": "❌", "undecided": "❔"}
    lines = [
        f"### {mark[decision.answer]} Safety gate: {decision.answer}",
        "",
        markdown(decision.sentence, 2000),
        "",
        f"Baseline {markdown(who(decision, 'baseline'))}, candidate {markdown(who(decision, 'candidate'))}.",
        "",
        "| limit | baseline % | candidate % | worse by (interval) | prompts | answer |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for c in decision.criteria:
        shown = f"{points(c.change, signed=c.kind != 'ceiling')} ({bounds_of(c)})"
        unscored = c.unscored_baseline + c.unscored_candidate
        prompts = f"{c.n_prompts}" + (f" over {c.n_seeds} seeds" if c.n_seeds > 1 else "")
        prompts += f", {unscored} unscored" if unscored else ""
        cells = [
            f"{c.title}: {limit_of(c)}",
            "" if c.kind == "ceiling" else points(c.baseline),
            points(c.candidate),
            shown,
            prompts,
            c.answer,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", f"Intervals at {decision.confidence:.0%}, paired by prompt."]
    if decision.judge:
        lines[-1] += f" Judge: {markdown(decision.judge)}."
    said = remarks(decision)
    lines += [*([""] if said else []), *(f"- {markdown(remark, 500)}" for remark in said)]
    return "\n".join(lines) + "\n"


def remarks(decision: Decision) -> list[str]:
    """What every output says beside the criteria: judges that disagree, and the runs' own notes."""
    said = [judges_disagree(o.judge, o.answer, decision.judge, decision.answer) for o in decision.disagreements]
    return [*said, *decision.notes]


def who(decision: Decision, role: str) -> str:
    """A side's arm and model, with its seeds where it has several."""
    side = decision.baseline if role == "baseline" else decision.candidate
    seeds = f", seeds {', '.join(map(str, side.seeds))}" if len(side.seeds) > 1 else ""
    return one_line(side.arm + (f" ({side.model}{seeds})" if side.model or seeds else ""))


def _line(c: Criterion) -> str:
    before = "" if c.kind == "ceiling" else f"baseline {points(c.baseline)} %, "
    return (
        f"{c.name} = {c.limit:g}: {before}candidate {points(c.candidate)} %, interval {bounds_of(c)}; "
        f"{c.n_prompts} prompts, {c.n_seeds} seeds, {c.interval}; one-sided p of a fail {_p(c.p_fail)}"
    )


def _p(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.2g}"


def _xml(text: str) -> str:
    return _NOT_XML.sub("", visible(text))
