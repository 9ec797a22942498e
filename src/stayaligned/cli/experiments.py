"""`stayaligned run`, `bench`, `demo` and `validate`: experiments and grids from YAML."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stayaligned.cli.console import err, errors, note, out
from stayaligned.cli.modes import answer
from stayaligned.cli.options import Out, Overrides, Plugins, load_plugins
from stayaligned.cli.output import print_report, run_and_show
from stayaligned.core.errors import StayalignedError
from stayaligned.core.processes import require_one_process

if TYPE_CHECKING:
    from stayaligned.experiments.grid import Grid

EXIT_FAILED = 1

Config = Annotated[Path, typer.Argument(help="A YAML file.", show_default=False)]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Number of worker processes; by default one per core, or one with a GPU.")
]


def run(config: Config, overrides: Overrides = None, *, out_dir: Out, plugin: Plugins = None) -> None:
    """Run one experiment.

    Fine-tune, patch, generate completions, judge them, and measure harm, over-refusal and utility. Completed stages are
    reused when the command is run again.
    """
    from stayaligned.experiments.config.experiment import load_experiment

    load_plugins(plugin)
    run_and_show(load_experiment(config, overrides or ()), out_dir)


def bench(
    config: Config,
    overrides: Overrides = None,
    *,
    out_dir: Out,
    workers: Workers = None,
    plugin: Plugins = None,
) -> None:
    """Run a grid of experiments.

    A stage that several experiments share is computed once. Exit code 1: some experiments failed, 2: all failed.
    """
    from stayaligned.experiments.grid import load_grid

    load_plugins(plugin)
    _run_grid(load_grid(config, overrides or ()), out_dir, workers, plugin or [])


def demo(
    out_dir: Annotated[Path, typer.Option("--out", help="Output directory.")] = Path("demo"), workers: Workers = None
) -> None:
    """Run the demo: minutes on a CPU, no download.

    Attacks and defends a tiny model of the embedded testbed, prints a table, and writes report.html.
    """
    from importlib.resources import as_file, files

    from stayaligned.experiments.grid import load_grid

    with as_file(files("stayaligned.testbed") / "demo.yaml") as config:
        grid = load_grid(config)
    _run_grid(grid, out_dir, workers, [])


def validate(config: Config, overrides: Overrides = None, plugin: Plugins = None) -> None:
    """Check a configuration without running it.

    Accepts an experiment, a grid or an alignment, and reports every error at once.
    """
    from stayaligned.experiments.config.alignment import load_alignment
    from stayaligned.experiments.config.experiment import load_experiment
    from stayaligned.experiments.config.packages import require_for_training, require_installed
    from stayaligned.experiments.config.yaml_file import load_yaml
    from stayaligned.experiments.grid import load_grid
    from stayaligned.experiments.preview import preview_training

    load_plugins(plugin)
    content, notes = load_yaml(config), list[str]()
    if "data" in content and "model" not in content:
        alignment = load_alignment(str(config), {}, overrides or ())
        require_for_training(alignment.trainer)
        kind, arms = f"alignment of {alignment.base_model}", list[str]()
    elif "axes" in content:
        experiments = load_grid(config, overrides or ()).expand(str(config))
        require_installed(experiments, report=True)
        notes = [f"{one.arm}: {note}" for one in experiments for note in preview_training(one)]
        kind, arms = f"grid of {len(experiments)} experiments", [one.arm for one in experiments]
    else:
        experiment = load_experiment(config, overrides or ())
        require_installed([experiment], report=True)
        notes = list(preview_training(experiment))
        kind, arms = f"experiment ({experiment.arm}, seed {experiment.seed})", [experiment.arm]
    answer(file=config, kind=kind.split()[0], arms=arms)
    out.print(f"{config}: a valid {kind}", soft_wrap=True)
    for text in dict.fromkeys(notes):
        note(text)


def _run_grid(grid: Grid, directory: Path, workers: int | None, plugins: list[Path]) -> None:
    from stayaligned.cli.progress import GridProgress
    from stayaligned.experiments.config.packages import require_installed
    from stayaligned.experiments.grid import run_grid

    require_one_process("a grid")
    require_installed(grid.expand(), report=True)
    with GridProgress(err) as listener:
        outcome = run_grid(grid, directory, workers=workers, plugins=plugins, listener=listener)
    if not outcome.computed and not outcome.failures:
        err.print(f"nothing was computed: every stage of this grid is stored in {directory}", soft_wrap=True)
    if outcome.results:
        print_report([directory], directory)
    answer(failures=outcome.failures)
    for name, error in outcome.failures.items():
        errors.print(f"failed: {name}: {error}", soft_wrap=True)
    if outcome.failures:
        failed, again = f"{len(outcome.failures)} experiment(s) failed", "rerun the same command to try them again."
        if not outcome.results:
            raise StayalignedError(f"{failed}, the first with: {next(iter(outcome.failures.values()))}", hint=again)
        errors.print(f"{failed}; {again}")
        raise typer.Exit(EXIT_FAILED)
