"""A decision as JSON, JUnit XML and Markdown. Names and reasons may contain untrusted text."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from stayaligned.core.text import markdown, one_line, percent, visible
from stayaligned.gate.values import Criterion, Decision
from stayaligned.gate.words import (
    confidence_text,
    correction_cells,
    describe_correction,
    describe_disagreement,
    interval_text,
    limit_text,
    mode_text,
)

_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that XML 1.0 forbids, even as entities."""


def to_json(decision: Decision) -> str:
    """Render the decision as JSON; `schema_version` is raised when a field changes its meaning."""
    return decision.model_dump_json(indent=2) + "\n"


def to_junit(decision: Decision) -> str:
    """Render the decision as JUnit XML, one test case per criterion: `fail` is a failure, `undecided` an error.

    `undecided` is not `skipped`, which CI systems show as passed.
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
    names = [(criterion.name, criterion.against) for criterion in decision.criteria]
    for criterion in decision.criteria:
        several = names.count((criterion.name, criterion.against)) > 1
        details = [",".join(criterion.prompt_sets)] if several else []
        details += ["against the anchor"] if criterion.against == "anchor" else []
        name = f"{criterion.name}[{'; '.join(details)}]" if details else criterion.name
        case = ElementTree.SubElement(suite, "testcase", classname="stayaligned.gate", name=name)
        if criterion.answer != "pass":
            kind = "failure" if criterion.answer == "fail" else "error"
            found = ElementTree.SubElement(case, kind, type=criterion.answer, message=_xml(criterion.reason))
            found.text = _xml(_line(criterion))
        else:
            ElementTree.SubElement(case, "system-out").text = _xml(criterion.reason)
    lines = [decision.sentence, *remarks(decision)]
    ElementTree.SubElement(suite, "system-out").text = _xml("\n".join(lines))
    ElementTree.indent(suite)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(suite, encoding="unicode") + "\n"


def to_markdown(decision: Decision) -> str:
    """Render the decision as Markdown for a comment on a pull request."""
    mark = {"pass": "✅", "fail": "❌", "undecided": "❔"}
    lines = [
        f"### {mark[decision.answer]} Safety gate: {decision.answer}",
        "",
        markdown(decision.sentence, 2000),
        "",
        f"Baseline {markdown(side_text(decision, 'baseline'))}, "
        f"candidate {markdown(side_text(decision, 'candidate'))}"
        + (f", anchor {markdown(side_text(decision, 'anchor'))}." if decision.anchor else "."),
        "",
        "| limit | baseline % | candidate % | worse by (interval) | prompts | conclusion |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for c in decision.criteria:
        shown = f"{percent(c.change, signed=c.kind != 'ceiling')} ({interval_text(c)})"
        unscored = c.unscored_baseline + c.unscored_candidate
        prompts = f"{c.n_prompts}" + (f" over {c.n_seeds} seeds" if c.n_seeds > 1 else "")
        prompts += f", {unscored} unscored" if unscored else ""
        if c.correction is not None:
            alone, labelled = correction_cells(c)
            shown += f"; judge alone {alone}"
            prompts += f", labelled {labelled}"
        cells = [
            f"{c.title}: {limit_text(c)}",
            "" if c.kind == "ceiling" else percent(c.baseline),
            percent(c.candidate),
            shown,
            prompts,
            c.answer,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", f"Intervals at {confidence_text(decision.interval_confidence)}, paired by prompt."]
    mode = mode_text(decision)
    if mode:
        lines[-1] += f" Declared: {mode}."
    if decision.judge:
        lines[-1] += f" Judge: {markdown(decision.judge)}."
    notes = remarks(decision)
    lines += [*([""] if notes else []), *(f"- {markdown(note, 500)}" for note in notes)]
    return "\n".join(lines) + "\n"


def remarks(decision: Decision) -> list[str]:
    """Return the remarks of every output format: corrections by labels, judges that disagree, notes of the runs."""
    corrections = [text for criterion in decision.criteria for text in describe_correction(criterion)]
    disagreements = [
        describe_disagreement(o.judge, o.answer, decision.judge, decision.answer) for o in decision.disagreements
    ]
    return [*corrections, *disagreements, *decision.notes]


def side_text(decision: Decision, role: str) -> str:
    """Describe the arm and model of one side, with its seeds if it has several."""
    side = {"baseline": decision.baseline, "candidate": decision.candidate, "anchor": decision.anchor}[role]
    if side is None:
        return ""
    seeds = f", seeds {', '.join(map(str, side.seeds))}" if len(side.seeds) > 1 else ""
    return one_line(side.arm + (f" ({side.model}{seeds})" if side.model or seeds else ""))


def _line(c: Criterion) -> str:
    before = "" if c.kind == "ceiling" else f"{c.against} {percent(c.baseline)} %, "
    seeds = f"{c.n_seeds} seed{'s' if c.n_seeds > 1 else ''}"
    return (
        f"{c.name} = {c.limit:g}: {before}candidate {percent(c.candidate)} %, interval {interval_text(c)}; "
        f"{c.n_prompts} prompts, {seeds}, {c.interval}; one-sided p-value of a fail {_p(c.p_fail)}"
    )


def _p(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.2g}"


def _xml(text: str) -> str:
    return _NOT_XML.sub("", visible(text))
