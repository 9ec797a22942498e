"""`stayaligned doctor`: say what will fail, and how long it takes, before anything is run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stayaligned.cli.console import out
from stayaligned.cli.modes import answer
from stayaligned.cli.options import Overrides, Plugins, load_plugins

EXIT_WILL_FAIL = 1


def doctor(
    config: Annotated[
        Path | None, typer.Argument(help="An experiment, a grid or an alignment; without it, only the machine.")
    ] = None,
    overrides: Overrides = None,
    *,
    out_dir: Annotated[Path, typer.Option("--out", help="Where the run will write.")] = Path(),
    quick: Annotated[bool, typer.Option("--quick", help="Measure no steps and completions.")] = False,
    ask: Annotated[bool, typer.Option("--ask", help="Ask each server for one completion or verdict.")] = False,
    plugin: Plugins = None,
) -> None:
    """Say what will fail and how long it takes.

    Checks versions, machine, model, data and memory, and measures a few steps and completions of the experiment, of a
    grid's arms, or of an alignment (the files of `run`, `bench` and `align`). Nothing is kept. Exit code 0: nothing was
    found that fails, 1: something will fail, 2: the check itself failed.
    """
    from stayaligned.cli.progress import status
    from stayaligned.experiments.doctor import diagnose

    load_plugins(plugin)
    with status("check") as progress:
        found = diagnose(config, overrides or (), quick=quick, ask=ask, out=out_dir, progress=progress)
    answer(findings=found.findings, estimates=found.estimates, fails=found.fails)
    for one in found.findings:
        out.print(f"{one.state:<5} {one.check:<14} {one.text}", soft_wrap=True)
        if one.hint and one.state != "ok":
            out.print(f"{'':<20} {one.hint}", soft_wrap=True)
    if found.fails:
        raise typer.Exit(EXIT_WILL_FAIL)
