"""`stayaligned gate`: decide whether a candidate may replace a baseline."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stayaligned.cli.console import note, out, plain_table, wrote
from stayaligned.cli.modes import answer
from stayaligned.cli.options import SHARE, Plugins, field_options, load_plugins
from stayaligned.core.errors import StayalignedError, expectation
from stayaligned.core.text import percent
from stayaligned.gate import Limits

if TYPE_CHECKING:
    from pydantic import ValidationError

    from stayaligned.gate import ComparedSide, Decision

EXIT_CODES = {"pass": 0, "fail": 1, "undecided": 3}
"""Exit codes by decision; 2 is invalid input, as in every command."""


_MODES = ("non_inferiority", "look")


Labels = Annotated[
    Path | None,
    typer.Option(help="A directory that `label` wrote for these two evaluations: limits by a judge are corrected."),
]
MinAgreement = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=1,
        help="With --labels: least Cohen's kappa of judge and people, on each side, with which a judge may decide.",
    ),
]


Anchor = Annotated[
    list[Path] | None,
    typer.Option(help="Likewise, for a fixed earlier model: limits on a change hold against it as well."),
]
Previous = Annotated[
    Path | None,
    typer.Option(help="With --look: the decision (--json FILE) of an earlier look, which must be of the same plan."),
]
SelfTest = Annotated[
    bool,
    typer.Option(
        "--self-test",
        help="Compute instead how often equal models would pass and fail, from the baseline alone; exit code 3 if they "
        "fail too often.",
    ),
]
Explain = Annotated[bool, typer.Option("--explain", help="Explain each limit and the decision in plain words.")]
JsonFile = Annotated[
    Path | None,
    typer.Option(
        "--json", metavar="[FILE]", help="Write the decision to this JSON file; without FILE, print it as JSON."
    ),
]


def _arm(role: str) -> Any:
    return typer.Option(help=f"The arm to use as the {role}, if its directory has several.")


@field_options(Limits, *_MODES)
@field_options(Limits, *(name for name in Limits.model_fields if name not in _MODES), **SHARE)
def gate(
    *,
    baseline: Annotated[
        list[Path],
        typer.Option(help="A directory that `run`, `evaluate`, `judge` or `bench` wrote; repeat it for each seed."),
    ],
    candidate: Annotated[
        list[Path] | None, typer.Option(help="Likewise, for the model that would replace the baseline; repeatable.")
    ] = None,
    baseline_arm: Annotated[str | None, _arm("baseline")] = None,
    candidate_arm: Annotated[str | None, _arm("candidate")] = None,
    anchor: Anchor = None,
    anchor_arm: Annotated[str | None, _arm("anchor")] = None,
    previous: Previous = None,
    judge: Annotated[
        str | None, typer.Option(help="The judge whose verdicts count; by default the primary judge.")
    ] = None,
    labels: Labels = None,
    min_judge_agreement: MinAgreement = None,
    json_file: JsonFile = None,
    junit_file: Annotated[Path | None, typer.Option("--junit", help="Write the decision to this JUnit file.")] = None,
    markdown_file: Annotated[
        Path | None, typer.Option("--markdown", help="Write a comment for a code review to this Markdown file.")
    ] = None,
    explain: Explain = False,
    self_test: SelfTest = False,
    plugin: Plugins = None,
    **limits: Any,
) -> None:
    """Compare a candidate with a baseline.

    Decides whether the candidate is worse than the baseline by more than the limits. Exit code 0: pass, 1: fail, 3:
    undecided (the output says how many prompts would decide), 2: invalid input or any other error. Write shares as 2%
    or 0.02.
    """
    from stayaligned.gate import decide, read_people, read_side
    from stayaligned.gate.earlier import follow_plan, read_decision

    with _no_error_is_a_decision([*baseline, *(candidate or []), *(anchor or [])]):
        load_plugins(plugin)
        if min_judge_agreement is not None and labels is None:
            raise StayalignedError(
                "--min-judge-agreement needs --labels", hint="Label completions: `stayaligned label`."
            )
        if self_test:
            _refuse_beside_self_test(
                candidate=candidate,
                anchor=anchor,
                previous=previous,
                labels=labels,
                junit=junit_file,
                markdown=markdown_file,
            )
        files = {"json": json_file, "junit": junit_file, "markdown": markdown_file}
        outputs = {kind: path for kind, path in files.items() if path is not None and str(path) != "-"}
        checked = _limits(limits)
        earlier = read_decision(previous) if previous else None
        _refuse_unwritable([*outputs.values()], previous)
        for path in outputs.values():
            path.unlink(missing_ok=True)  # after an error, no file holds an earlier decision
        if self_test:
            code = _test_itself(read_side("baseline", baseline, baseline_arm), checked, judge, outputs)
        else:
            before = read_side("baseline", baseline, baseline_arm)
            if not candidate:
                raise StayalignedError("--candidate is missing", hint="Give the directory of its evaluation.")
            after = read_side("candidate", candidate, candidate_arm)
            fixed = read_side("anchor", anchor, anchor_arm) if anchor else None
            _refuse_same_run([before, fixed], after)
            people = None if labels is None else read_people(labels, min_agreement=min_judge_agreement)
            decision = decide(before, after, checked, anchor=fixed, judge=judge, people=people)
            decision = follow_plan(earlier, decision)
            _write(decision, outputs)
            _print(decision, explain=explain)
            code = EXIT_CODES[decision.answer]
        for path in outputs.values():
            wrote(path)
    raise typer.Exit(code)


def _refuse_same_run(references: list[ComparedSide | None], candidate: ComparedSide) -> None:
    for side in references:
        if side and {run.directory.resolve() for run in side.runs} & {
            run.directory.resolve() for run in candidate.runs
        }:
            raise StayalignedError(
                f"{side.role} and candidate are the same run",
                hint="Give two different runs, or two arms of one `bench`.",
            )


@contextlib.contextmanager
def _no_error_is_a_decision(directories: list[Path]) -> Generator[None]:
    """Turn every error, and a plug-in's `sys.exit`, into the error of invalid input: 0 and 1 are decisions."""
    try:
        yield
    except StayalignedError:
        raise
    except (Exception, SystemExit) as error:
        if isinstance(error, OSError) or "Symlink loop" in str(error):
            place, reason = getattr(error, "filename", None), getattr(error, "strerror", None) or str(error)
            raise StayalignedError(
                f"{place or 'system'}: {reason}", hint="Check this path, or choose another one."
            ) from error
        what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise StayalignedError(
            f"{', '.join(map(str, directories))}: can't be compared: {what}",
            hint="A result file was edited, or a plug-in returned invalid values; run the evaluation again.",
        ) from error


def _limits(given: dict[str, Any]) -> Limits:
    from pydantic import ValidationError

    try:
        return Limits.model_validate(given)
    except ValidationError as error:
        raise _wrong_limits(error) from None


def _wrong_limits(error: ValidationError) -> StayalignedError:
    first = error.errors()[0]
    if not first["loc"]:
        return StayalignedError("no limit is set", hint="Give one or more, for example --max-harm-increase 2%.")
    option = "--" + str(first["loc"][0]).replace("_", "-")
    return StayalignedError(
        f"{option} {first['input']:g}: {expectation(first)}",
        hint="Choose a limit above 0: no number of prompts can show that nothing changed at all.",
    )


def _refuse_unwritable(paths: list[Path], previous: Path | None) -> None:
    """Raise an error, before anything is computed, for a path that can't be written or that two outputs share.

    The decision of an earlier look is never replaced.
    """
    from stayaligned.evaluation.results import EVIDENCE_FILE, INDEX_FILE, RESULT_FILE, TIMES_FILE

    if len({path.resolve() for path in paths}) < len(paths):
        raise StayalignedError("two outputs have the same path", hint="Give each output its own path.")
    if previous is not None and previous.resolve() in {path.resolve() for path in paths}:
        raise StayalignedError(
            f"{previous} is the decision of the earlier look, which an output would replace",
            hint="Give each look its own file.",
        )
    for path in paths:
        reason = None
        if path.is_dir():
            reason = "is a directory"
        elif path.exists() and not path.is_file():
            reason = "is not a regular file"
        elif path.name in (RESULT_FILE, EVIDENCE_FILE, TIMES_FILE, INDEX_FILE):
            reason = "this is the name of a file of an evaluation"
        elif path.exists() and _is_in_results(path) and not _is_decision(path):
            reason = "it is a file of an evaluation or of labels"
        above = next(place for place in path.absolute().parents if place.exists())
        if reason is None and not above.is_dir():
            reason = f"{above} is not a directory"
        elif reason is None and not os.access(above, os.W_OK):
            reason = "its directory is not writable"
        if reason is not None:
            raise StayalignedError(f"{path} can't be written: {reason}", hint="Choose another path.")


def _is_in_results(path: Path) -> bool:
    """Whether a file lies in an output directory of `run`, `evaluate`, `judge`, `bench` or `label`, or below one."""
    from stayaligned.evaluation.labelling.store import DESIGN_FILE
    from stayaligned.evaluation.results import INDEX_FILE, RESULT_FILE

    above = {*path.absolute().parents, *path.resolve().parents}
    return any(
        (place / RESULT_FILE).is_file()
        or (place / DESIGN_FILE).is_file()
        or ((place / INDEX_FILE).is_file() and (place / "runs").is_dir())
        for place in above
    )


def _is_decision(path: Path) -> bool:
    """Whether this command wrote a file: its kinds are told by how they begin."""
    with path.open("rb") as stream:
        start = stream.read(400)
    json_, junit, markdown = b'{\n  "schema_version": ', b'<testsuite name="stayaligned gate"', b"Safety gate: "
    return start.startswith(json_) or junit in start or (start.startswith(b"### ") and markdown in start)


def _write(decision: Decision, outputs: dict[str, Path]) -> None:
    """Write each file completely or not at all; if one can't be written, write the others and then raise its error."""
    from stayaligned.core.files import writable, write_text
    from stayaligned.gate import to_json, to_junit, to_markdown

    makers = {"json": to_json, "junit": to_junit, "markdown": to_markdown}
    texts = {path: makers[kind](decision) for kind, path in outputs.items()}
    failed: list[StayalignedError] = []
    for path, text in texts.items():
        try:
            with writable(path):
                write_text(path, text)
        except StayalignedError as error:
            failed.append(error)
    if failed:
        raise failed[0]


def _refuse_beside_self_test(**given: object) -> None:
    for name, value in given.items():
        if value:
            raise StayalignedError(
                f"--self-test excludes --{name}",
                hint="It needs --baseline, limits, and at most --json, --judge, --look, --non-inferiority.",
            )


def _test_itself(side: ComparedSide, limits: Limits, judge: str | None, outputs: dict[str, Path]) -> int:
    """Run the self-test, write and print it, and return the exit code."""
    from stayaligned.cli.progress import status
    from stayaligned.core.files import writable, write_text
    from stayaligned.evaluation.metrics import exact_interval
    from stayaligned.gate.self_test import DRAWS, self_test
    from stayaligned.gate.words import confidence_text, mode_text

    with status("self-test") as progress:
        found = self_test(side, limits, judge=judge, progress=progress)
    for path in outputs.values():
        with writable(path):
            write_text(path, found.model_dump_json(indent=2) + "\n")
    answer(**found.model_dump(exclude={"warnings"}))
    mode = f" ({mode_text(limits)})" if mode_text(limits) else ""
    out.print(f"What this gate decides on equal models{mode}; at most {confidence_text(limits.alpha)} may fail.")
    out.print()
    table = plain_table(f"% of {DRAWS} draws", *(one.drawn for one in found.shares), numbers=True)
    table.add_row("prompts", *(", ".join(map(str, one.n_prompts.values())) for one in found.shares))
    for name in ("passes", "fails", "undecided"):
        cells: list[str] = []
        for one in found.shares:
            low, high = exact_interval(getattr(one, name), one.n_draws)
            share = percent(getattr(one, name) / one.n_draws)
            cells.append(f"{share} ({percent(low)} to {percent(high)})")
        table.add_row(name, *cells)
    table.add_row("two such gates differ", *(percent(one.disagreement) for one in found.shares))
    out.print(table)
    for warning in found.warnings:
        note(warning)
    return 0 if found.sound else EXIT_CODES["undecided"]


def _print(decision: Decision, *, explain: bool) -> None:
    from stayaligned.gate.words import confidence_text, correction_cells, explain_decision, interval_text, mode_text
    from stayaligned.gate.writing import remarks, side_text

    answer(**decision.model_dump(exclude={"notes"}))
    out.print(decision.sentence, soft_wrap=True)
    out.print()
    out.print(f"baseline   {side_text(decision, 'baseline')}", soft_wrap=True)
    out.print(f"candidate  {side_text(decision, 'candidate')}", soft_wrap=True)
    if decision.anchor is not None:
        out.print(f"anchor     {side_text(decision, 'anchor')}", soft_wrap=True)
    if mode_text(decision):
        out.print(f"declared   {mode_text(decision)}")
    out.print()
    interval = f"{confidence_text(decision.interval_confidence)} interval"
    titles = ["%", "before", "after", "worse by", interval, "limit", "prompts", "unscored"]
    corrected = any(c.correction for c in decision.criteria)
    table = plain_table(*titles, *(["judge alone", "labelled"] if corrected else []), numbers=True)
    table.add_column("answer", no_wrap=True)
    for c in decision.criteria:
        of_a_change = c.kind != "ceiling"
        table.add_row(
            f"{c.title}, anchor" if c.against == "anchor" else c.title,
            percent(c.baseline) if of_a_change else "",
            percent(c.candidate),
            percent(c.change, signed=True) if of_a_change else "",
            interval_text(c),
            percent(c.limit, signed=of_a_change),
            str(c.n_prompts),
            str(c.unscored_baseline + c.unscored_candidate),
            *(correction_cells(c) if corrected else []),
            c.answer,
        )
    out.print(table)
    for remark in remarks(decision):
        note(remark)
    if explain:
        out.print()
        for paragraph in explain_decision(decision):
            out.print(paragraph, soft_wrap=True)
