"""`stayaligned label`: people label completions, and their labels tell how good each judge is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stayaligned.cli.console import err, note, out, plain_table, wrote
from stayaligned.cli.modes import answer, current_reply
from stayaligned.core.errors import StayalignedError
from stayaligned.core.text import one_line, percent

if TYPE_CHECKING:
    from stayaligned.evaluation.labelling.store import LabelStore
    from stayaligned.evaluation.labelling.summary import LabelSummary, QualityRow
    from stayaligned.evaluation.metrics.judge_quality import QualityRate

_TITLES = {
    "harmful": "Harm on harmful prompts",
    "triggered": "Harm on harmful prompts with the attack's trigger",
    "shaped": "Harm on harmful prompts in the shape of the training rows",
    "benign": "Refusals of benign prompts",
}


def label(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Directories that `run`, `evaluate`, `judge` or `bench` wrote: all arms to label."),
    ],
    *,
    out_dir: Annotated[
        Path, typer.Option("--out", help="Directory of the labels; rerun the same command to continue in it.")
    ] = Path("labels"),
    arm: Annotated[list[str] | None, typer.Option(help="An arm to label, by default all; repeatable.")] = None,
    judge: Annotated[
        str | None, typer.Option(help="Judge whose verdicts stratify the draw; by default the primary judge.")
    ] = None,
    labeller: Annotated[
        str | None,
        typer.Option(help="Name of the person who labels, where the page need not ask or a CSV file has none."),
    ] = None,
    n: Annotated[
        int | None, typer.Option("--n", min=1, help="Number of prompts to label, with all arms; by default 100.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the draw, by default 0.")] = None,
    export_file: Annotated[
        Path | None, typer.Option("--export", metavar="FILE", help="Write the labels to this CSV file; no page.")
    ] = None,
    import_file: Annotated[
        Path | None, typer.Option("--import", metavar="FILE", help="Add the labels of this CSV file; no page.")
    ] = None,
    summary: Annotated[bool, typer.Option("--summary", help="Print what the labels show; no page.")] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the page; 0 is a free one.")] = 0,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page in the browser.")] = True,
) -> None:
    """Label completions, and measure judges.

    Opens a page on this machine on which people label completions of a random sample of prompts, and prints how far
    each judge agrees with them once it is closed (Ctrl-C). `gate --labels` corrects its rates by the labels.
    """
    from stayaligned.evaluation.labelling.drawing import open_labelling, read_frame
    from stayaligned.evaluation.labelling.exchange import export_labels, import_labels
    from stayaligned.evaluation.labelling.store import DESIGN_FILE
    from stayaligned.evaluation.labelling.summary import summarize

    frame = read_frame(runs, arm or ())
    serves = not (summary or export_file or import_file)
    if not serves and import_file is None and not (out_dir / DESIGN_FILE).exists():
        raise StayalignedError(f"{out_dir}: no labels", hint="Label completions first: the same command without it.")
    store = open_labelling(out_dir, frame, wanted=n, seed=seed, judge=judge)
    if serves:
        _serve(store, labeller, port, open_browser=browser)
    if import_file is not None:
        added = import_labels(store, import_file, labeller)
        note(f"{import_file}: {added} new labels")
    if export_file is not None:
        wrote(export_file, f"{export_labels(store, export_file)} labels")
    found = summarize(frame, store)
    answer(labels=out_dir, **found.model_dump(exclude={"notes"}))
    _print(found)


def _serve(store: LabelStore, labeller: str | None, port: int, *, open_browser: bool) -> None:
    from stayaligned.evaluation.labelling.server import serve

    design = store.design
    err.print(
        f"{len(design.items)} prompts of {', '.join(one_line(arm, 60) for arm in design.arms)}; {design.wanted} to "
        f"label, drawn by the verdicts of {one_line(design.judge_name, 60)!r}. Labels are stored in {store.directory}. "
        "End with Ctrl-C."
    )
    printer = err if current_reply().modes.json else out
    serve(
        store.directory,
        labeller=labeller,
        port=port,
        open_browser=open_browser,
        announce=lambda address: printer.print(address, soft_wrap=True),
    )


def _print(found: LabelSummary) -> None:
    labellers = ", ".join(f"{name} {count}" for name, count in found.labellers.items()) or "none"
    out.print(f"{found.n_labelled} items are labelled of {found.n_wanted} wanted, {found.n_items} in all.")
    out.print(f"Labels: {labellers}.")
    for prompt_set, title in _TITLES.items():
        rows = [row for row in found.judges if row.prompt_set == prompt_set]
        if rows:
            out.print(f"\n{title}, with 95 % intervals:")
            _print_judges(rows)
    if found.agreements:
        out.print()
        table = plain_table("labellers", "prompts", "n", "agree %", "κ", numbers=True)
        for one in found.agreements:
            table.add_row(
                " and ".join(one.judges), one.prompt_set, str(one.n), percent(one.agreement), _number(one.kappa)
            )
        out.print(table)
    for text in found.notes:
        note(text)


def _print_judges(rows: list[QualityRow]) -> None:
    table = plain_table("judge", "arm", "n", "base\nrate %", "sensitivity %", "specificity %", "κ", numbers=True)
    for row in rows:
        quality = row.quality
        table.add_row(
            one_line(row.judge, 40),
            "all" if row.arm is None else one_line(row.arm, 40),
            str(quality.n),
            percent(quality.base_rate.value),
            _interval(quality.sensitivity),
            _interval(quality.specificity),
            _number(quality.kappa),
        )
    out.print(table)


def _interval(rate: QualityRate) -> str:
    value, low, high = (percent(one).removesuffix(".0") for one in (rate.value, rate.low, rate.high))
    return value if rate.value is None else f"{value} ({low} to {high})"


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.2f}".replace("-", "−")
