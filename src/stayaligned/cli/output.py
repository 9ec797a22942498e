"""Long work with its progress, and what comes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stayaligned.cli.console import err, out

if TYPE_CHECKING:
    from stayaligned.experiments.config.experiment import Experiment


def run_and_show(experiment: Experiment, directory: Path) -> None:
    """Run one experiment, write its report and print its table."""
    from stayaligned.experiments.run import run_experiment

    with err.status("starting", spinner_style="none") as status:
        result = run_experiment(
            experiment,
            directory,
            progress=lambda text, share: status.update(f"{text} {share:.0%}" if share else text),
            announce=lambda text: err.print(text, soft_wrap=True),
        )
    if result is None:  # one of several processes, whose first one tells
        return
    print_report([directory], directory)
    for product in ("adapter", "model"):
        if (directory / product).exists():
            out.print(f"{product}  {directory / product}", soft_wrap=True)


def print_report(
    sources: Sequence[Path], directory: Path, *, reference: str | None = None, title: str | None = None
) -> None:
    """Write the report of all results below `sources` into `directory`, and print its table.

    Raises:
        StayalignedError: if a result or its evidence is missing or was edited, or `reference` is no arm.
    """
    from stayaligned.evaluation.results import INDEX_FILE, distinguish_arms, read_index, read_results
    from stayaligned.report import build_report, terminal_table, write_report

    index: Mapping[str, Any] = {}
    for source in sources:
        if (source / INDEX_FILE).is_file():
            index = read_index(source)
    stored = distinguish_arms(read_results(sources))
    found = [one.result for one in stored]
    evidence = {one.result.id: one.evidence for one in stored}
    if reference is None:
        reference = index.get("reference") or None
        if reference is not None and reference not in {result.arm for result in found}:
            err.print(f"note: the reference arm {reference!r} has no result, so nothing is compared with it")
            reference = None
    arms = list(dict.fromkeys(result.arm for result in found))
    heading = title or index.get("title") or (arms[0] if len(arms) == 1 else "Comparison")
    built = build_report(found, title=heading, reference=reference, evidence=evidence)
    paths = write_report(built, directory)
    out.print(terminal_table(built))
    for path in paths:
        out.print(f"wrote  {path}", soft_wrap=True)
