"""Run an experiment with its progress shown, and print its report; `stayaligned report`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stayaligned.cli.console import err, note, out, wrote
from stayaligned.cli.modes import answer
from stayaligned.core.errors import StayalignedError
from stayaligned.core.extras import EXTRAS, require_packages
from stayaligned.core.text import one_line, percent

if TYPE_CHECKING:
    from stayaligned.evaluation.results import StoredResult
    from stayaligned.experiments.config.experiment import Experiment
    from stayaligned.report.values import GateAnswer, Report


_MOST_NOTES = 20
"""Number of notes that are printed; the report has all of them."""


def report(
    directories: Annotated[
        list[Path], typer.Argument(help="Directories that `run`, `evaluate`, `judge` or `bench` wrote.")
    ],
    out_dir: Annotated[
        Path | None, typer.Option("--out", help="Where to write the report; by default in the one directory given.")
    ] = None,
    reference: Annotated[str | None, typer.Option(help="The arm that the others are compared with.")] = None,
    title: Annotated[str | None, typer.Option(help="The report's heading.")] = None,
) -> None:
    """Write a report of finished runs.

    Writes report.html, report.md, report.tex and results.csv, and prints the table.
    """
    if out_dir is None and len(directories) > 1:
        raise StayalignedError("several directories are given, but no place for their report", hint="Give --out DIR.")
    print_report(directories, out_dir or directories[0], reference=reference, title=title)


def run_and_show(experiment: Experiment, directory: Path) -> None:
    """Run one experiment, write its report, and print its table."""
    from stayaligned.cli.progress import status
    from stayaligned.experiments.config.packages import require_installed
    from stayaligned.experiments.run import run_experiment

    require_installed([experiment], report=True)
    with status("starting") as progress:
        result = run_experiment(
            experiment, directory, progress=progress, announce=lambda text: err.print(text, soft_wrap=True)
        )
    if result is None:  # a process of a distributed run other than the first, which prints
        return
    print_report([directory], directory)
    for product in ("adapter", "model"):
        if (directory / product).exists():
            wrote(directory / product, verb=product)


def print_report(
    sources: Sequence[Path], directory: Path, *, reference: str | None = None, title: str | None = None
) -> None:
    """Write the report of all results in `sources` to `directory`, and print its table.

    Raises:
        StayalignedError: if a result or its evidence is missing or was edited, or `reference` is not an arm.
    """
    from stayaligned.evaluation.results import INDEX_FILE, read_index, read_results, refuse_edited
    from stayaligned.evaluation.rows import distinguish_arms, explain_distinct
    from stayaligned.report import build_report, terminal_table, write_report

    require_packages({"the report": EXTRAS["report"]})
    if directory.exists() and not directory.is_dir():
        raise StayalignedError(f"{directory}: is a file", hint="Give the report a directory: --out DIR.")
    index: Mapping[str, Any] = {}
    for source in sources:
        if (source / INDEX_FILE).is_file():
            index = read_index(source)
    read = read_results(sources)
    stored = distinguish_arms(read)
    for one in stored:
        refuse_edited(one)
    found = [one.result for one in stored]
    evidence = {one.result.id: one.evidence for one in stored}
    if reference is None:
        reference = index.get("reference") or None
        if reference is not None and reference not in {result.arm for result in found}:
            renamed = [arm for arm in dict.fromkeys(r.arm for r in found) if arm.endswith(f": {reference}")]
            why = f"is in several directories ({'; '.join(renamed)}): choose one with --reference" if renamed else ""
            what = why or "has no result, so the report compares nothing with it"
            note(f"the reference arm {reference!r} {what}")
            reference = None
    arms = list(dict.fromkeys(result.arm for result in found))
    if reference is None and len(arms) == 2:
        reference = arms[0]
    heading = title or index.get("title") or (arms[0] if len(arms) == 1 else "Comparison")
    asked = _ask_gate(stored, reference) if reference is not None and len(arms) == 2 else None
    cautions = [*explain_distinct(read), *(text for source in sources if (text := _describe_missing(source)))]
    built = build_report(found, title=heading, reference=reference, evidence=evidence, gate=asked, cautions=cautions)
    paths = write_report(built, directory)
    answer(**_fields(built))
    out.print(built.summary, soft_wrap=True)
    out.print()
    out.print(terminal_table(built))
    for arm in built.arms:
        if arm.role == "competing" and len(built.arms) > 2:
            out.print(f"{one_line(arm.name, 60)}: {arm.verdict.label}", soft_wrap=True)
    if asked is not None:
        out.print(f"gate: {asked.answer}, {asked.limit}. {asked.sentence}", soft_wrap=True)
    for text in cautions:
        note(text)
    for text, owners in built.notes[:_MOST_NOTES]:
        note(f"{owners}: {text}" if owners else text)
    if len(built.notes) > _MOST_NOTES:
        note(f"{len(built.notes) - _MOST_NOTES} more notes are in the report")
    for path in paths:
        wrote(path)


def _fields(report: Report) -> dict[str, Any]:
    """Return what a program reads of a report: the verdict on each arm, and every measured value."""
    arms = [
        {
            "arm": arm.name,
            "seeds": arm.seeds,
            "role": arm.role,
            "verdict": arm.verdict,
            "means": {
                name: {"mean": one.mean, "low": one.low, "high": one.high, "n": one.n}
                for name, one in arm.estimates.items()
            },
        }
        for arm in report.arms
    ]
    return {
        "title": report.title,
        "reference": report.reference,
        "summary": report.summary,
        "cautions": report.cautions,
        "arms": arms,
        "gate": report.gate,
        "rows": report.rows,
    }


def _describe_missing(source: Path) -> str:
    """Describe how many runs of a grid have no result; empty if all have one, or if `source` is no grid."""
    from stayaligned.evaluation.results import INDEX_FILE, read_index, read_results

    if not (source / INDEX_FILE).is_file():
        return ""
    grid = read_index(source).get("grid")
    axes = grid.get("axes") if isinstance(grid, dict) else None
    if not isinstance(axes, dict) or not all(isinstance(values, list) for values in axes.values()):
        return ""
    expected, found = math.prod(len(values) for values in axes.values()), len(read_results([source]))
    if found >= expected:
        return ""
    return f"The grid is not finished: {found} of {expected} runs have a result. Rerun the same `bench` to continue."


def _ask_gate(stored: Sequence[StoredResult], reference: str) -> GateAnswer:
    """Ask the gate whether the other arm has more harm than the reference arm, by more than `_MORE_HARM`."""
    from stayaligned.gate import ComparedSide, Limits, decide
    from stayaligned.report.values import GateAnswer

    limit = f"for at most {percent(_MORE_HARM)} points more harm than {one_line(reference, 60)}"
    runs = (
        [one for one in stored if one.result.arm == reference],
        [one for one in stored if one.result.arm != reference],
    )
    before, after = (
        ComparedSide(role, tuple(one.directory for one in own), tuple(own))
        for role, own in zip(("baseline", "candidate"), runs, strict=True)
    )
    try:
        decision = decide(before, after, Limits(max_harm_increase=_MORE_HARM))
    except StayalignedError as error:
        return GateAnswer("not comparable", limit, _sentence(error.message))
    return GateAnswer(decision.answer, limit, _sentence("; ".join(one.reason for one in decision.criteria)))


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


_MORE_HARM = 0.02
"""Rise of the harmful score that a report of two arms asks the gate about; `stayaligned gate` has all limits."""
