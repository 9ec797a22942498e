"""`stayaligned gate`: whether a candidate may replace a baseline."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stayaligned.cli.console import err, out, plain_table
from stayaligned.cli.options import Plugins, load_plugins, share
from stayaligned.core.errors import StayalignedError

if TYPE_CHECKING:
    from pydantic import ValidationError

    from stayaligned.gate import Decision

EXIT_CODES = {"pass": 0, "fail": 1, "undecided": 3}
"""2 is bad input, as of every command."""


def gate(
    *,
    baseline: Annotated[
        list[Path], typer.Option(help="What `run`, `evaluate`, `judge` or `bench` wrote; once per seed if several.")
    ],
    candidate: Annotated[list[Path], typer.Option(help="The same of the model that would replace it.")],
    baseline_arm: Annotated[str | None, typer.Option(help="Which arm, where there are several.")] = None,
    candidate_arm: Annotated[str | None, typer.Option(help="Which arm, where there are several.")] = None,
    max_harm_increase: Annotated[float | None, share("Rise of the harmful score: 2% is two points.")] = None,
    max_over_refusal_increase: Annotated[float | None, share("Rise of over-refusal.")] = None,
    max_utility_drop: Annotated[float | None, share("Drop of fine-tune accuracy.")] = None,
    max_skills_drop: Annotated[float | None, share("Drop of the skills kept.")] = None,
    max_degeneration_increase: Annotated[
        float | None, share("Rise of the share of answers that are no language.")
    ] = None,
    max_harm: Annotated[float | None, share("The candidate's harmful score itself.")] = None,
    max_over_refusal: Annotated[float | None, share("The candidate's over-refusal itself.")] = None,
    max_degeneration: Annotated[float | None, share("The candidate's degeneration itself.")] = None,
    max_unscored: Annotated[float, share("A larger share of unscored answers leaves it undecided.")] = 0.1,
    confidence: Annotated[float, share("Of the two-sided intervals.")] = 0.95,
    judge: Annotated[str | None, typer.Option(help="Whose verdicts count; the primary judge if not given.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the decision here.")] = None,
    junit_file: Annotated[Path | None, typer.Option("--junit", help="Write JUnit's XML here.")] = None,
    markdown_file: Annotated[Path | None, typer.Option("--markdown", help="Write a comment for a review here.")] = None,
    plugin: Plugins = None,
) -> None:
    """Decide whether a candidate is worse than a baseline by more than the limits.

    Exit code 0: pass, 1: fail, 3: undecided (says how many prompts would decide), 2: the input is wrong. Shares are
    written as 2% or 0.02.
    """
    from pydantic import ValidationError

    from stayaligned.gate import Limits, decide, read_side, to_json, to_junit, to_markdown

    given = {name: value for name, value in locals().items() if name in Limits.model_fields}
    load_plugins(plugin)
    try:
        limits = Limits.model_validate(given)
    except ValidationError as error:
        raise _wrong_limits(error) from None
    files = [path for path in (json_file, junit_file, markdown_file) if path is not None]
    _refuse_unwritable(files)
    before, after = read_side("baseline", baseline, baseline_arm), read_side("candidate", candidate, candidate_arm)
    if {run.directory.resolve() for run in before.runs} & {run.directory.resolve() for run in after.runs}:
        raise StayalignedError("baseline and candidate are the same run", hint="Name two evaluations, or two arms.")
    try:
        decision = decide(before, after, limits, judge=judge)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        # Never exit code 1, which says that the candidate failed: what came here was edited, or a plug-in's mistake.
        raise StayalignedError(
            f"these runs can't be compared: {error}", hint="A result was edited, or a plug-in gave what it must not."
        ) from error
    _print(decision)
    texts = zip((json_file, junit_file, markdown_file), (to_json, to_junit, to_markdown), strict=True)
    _write({path: make(decision) for path, make in texts if path is not None})
    raise typer.Exit(EXIT_CODES[decision.answer])


def _wrong_limits(error: ValidationError) -> StayalignedError:
    first = error.errors()[0]
    if not first["loc"]:
        return StayalignedError("no limit is set", hint="Give one or more, for example --max-harm-increase 2%.")
    option = "--" + str(first["loc"][0]).replace("_", "-")
    return StayalignedError(
        f"{option} {first['input']:g}: {first['msg'].lower()}",
        hint="Limits lie above 0: that nothing changed at all, no number of prompts can show.",
    )


def _refuse_unwritable(paths: list[Path]) -> None:
    """Before anything is computed: a place that can't be written, or that two outputs share."""
    if len({path.absolute() for path in paths}) < len(paths):
        raise StayalignedError("two outputs have the same path", hint="Give each its own.")
    for path in paths:
        reason = "is a directory" if path.is_dir() else None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = error.strerror
        if reason is None and not os.access(path.parent, os.W_OK):
            reason = "its directory is not writable"
        if reason is not None:
            raise StayalignedError(f"{path} can't be written: {reason}", hint="Choose another place.")


def _write(texts: dict[Path, str]) -> None:
    """Write each file whole or not at all; one that fails doesn't keep the others from being written."""
    from stayaligned.core.files import writable, write_text

    failed: list[StayalignedError] = []
    for path, text in texts.items():
        try:
            with writable(path):
                write_text(path, text)
        except StayalignedError as error:
            failed.append(error)
        else:
            err.print(f"wrote  {path}", soft_wrap=True)
    if failed:
        raise failed[0]


def _print(decision: Decision) -> None:
    from stayaligned.gate.words import bounds_of, points
    from stayaligned.gate.writing import remarks, who

    out.print(decision.sentence, soft_wrap=True)
    out.print()
    out.print(f"baseline   {who(decision, 'baseline')}", soft_wrap=True)
    out.print(f"candidate  {who(decision, 'candidate')}", soft_wrap=True)
    out.print()
    interval = f"{decision.confidence:.0%} interval"
    table = plain_table("%", "before", "after", "worse by", interval, "limit", "prompts", "unscored", numbers=True)
    table.add_column("answer", no_wrap=True)
    for c in decision.criteria:
        of_a_change = c.kind != "ceiling"
        table.add_row(
            c.title,
            points(c.baseline) if of_a_change else "",
            points(c.candidate),
            points(c.change, signed=True) if of_a_change else "",
            bounds_of(c),
            points(c.limit, signed=of_a_change),
            str(c.n_prompts),
            str(c.unscored_baseline + c.unscored_candidate),
            c.answer,
        )
    out.print(table)
    for remark in remarks(decision):
        out.print(f"note: {remark}", soft_wrap=True)
