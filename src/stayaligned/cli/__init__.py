"""The command: parse, call one function, print."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stayaligned.cli.align import align
from stayaligned.cli.console import err, out, plain_table
from stayaligned.cli.curvature import curvature
from stayaligned.cli.evaluate import evaluate
from stayaligned.cli.gate import gate
from stayaligned.cli.judge import judge
from stayaligned.cli.options import Out, Overrides, Plugins, load_plugins
from stayaligned.cli.output import print_report, run_and_show
from stayaligned.cli.power import power
from stayaligned.cli.project import project
from stayaligned.cli.subspace import subspace_app
from stayaligned.core.errors import StayalignedError

if TYPE_CHECKING:
    from stayaligned.core.component import Registry
    from stayaligned.experiments.grid import Grid

EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 1, 2, 130

app = typer.Typer(
    name="stayaligned",
    help="Fine-tune an aligned language model, and show that it stayed aligned.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


Config = Annotated[Path, typer.Argument(help="A YAML file.", show_default=False)]
Workers = Annotated[int | None, typer.Option(min=1, help="Processes; by default one a core, or one with a GPU.")]


def main() -> None:
    """Run the command. A user's mistake is one message and exit code 2; Ctrl-C, which typer turns into 130, another."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app()
    except StayalignedError as error:
        err.print(f"error: {error.message}", soft_wrap=True)
        if error.hint:
            err.print(f"hint: {error.hint}", soft_wrap=True)
        sys.exit(EXIT_BAD_INPUT)
    except SystemExit as ended:
        if ended.code == EXIT_INTERRUPTED:
            err.print("Interrupted. What was finished is kept: rerun the same command to continue.")
            sys.stdout.flush()
            sys.stderr.flush()
            # An interrupt that struck inside an exec (of a dataclass being imported, say) makes Python end itself by
            # the signal whatever the exit code; everything has been cleaned up by now.
            os._exit(EXIT_INTERRUPTED)
        raise
    except OSError as error:
        err.print(f"error: {error.filename or 'system'}: {error.strerror or error}", soft_wrap=True)
        err.print("hint: What was finished is kept: mend this and rerun the same command to continue.")
        sys.exit(EXIT_BAD_INPUT)


@app.command()
def run(config: Config, overrides: Overrides = None, *, out_dir: Out, plugin: Plugins = None) -> None:
    """Run one experiment: fine-tune, patch, generate, judge, measure."""
    from stayaligned.experiments.config.experiment import load_experiment

    load_plugins(plugin)
    run_and_show(load_experiment(config, overrides or ()), out_dir)


@app.command()
def bench(
    config: Config,
    overrides: Overrides = None,
    *,
    out_dir: Out,
    workers: Workers = None,
    plugin: Plugins = None,
) -> None:
    """Run a grid of experiments; shared stages are computed once."""
    from stayaligned.experiments.grid import load_grid

    load_plugins(plugin)
    _run_grid(load_grid(config, overrides or ()), out_dir, workers, plugin or [])


@app.command()
def demo(
    out_dir: Annotated[Path, typer.Option("--out", help="Output directory.")] = Path("demo"), workers: Workers = None
) -> None:
    """The whole story on the embedded testbed, in minutes on a CPU: a table and report.html."""
    from importlib.resources import as_file, files

    from stayaligned.experiments.grid import load_grid

    with as_file(files("stayaligned.testbed") / "demo.yaml") as config:
        grid = load_grid(config)
    _run_grid(grid, out_dir, workers, [])


@app.command()
def report(
    directories: Annotated[list[Path], typer.Argument(help="What `run`, `evaluate`, `judge` or `bench` wrote.")],
    out_dir: Annotated[Path | None, typer.Option("--out", help="Where to write; by default that directory.")] = None,
    reference: Annotated[str | None, typer.Option(help="The arm that the others are compared with.")] = None,
    title: Annotated[str | None, typer.Option(help="The report's heading.")] = None,
) -> None:
    """Write report.html, report.md and results.csv of any runs, and print the table."""
    if out_dir is None and len(directories) > 1:
        raise StayalignedError("several directories are named, and no place for their report", hint="Give --out DIR.")
    print_report(directories, out_dir or directories[0], reference=reference, title=title)


app.command()(evaluate)
app.command()(judge)
app.command()(gate)
app.command()(power)
app.command()(align)
app.command()(project)
app.command()(curvature)
app.add_typer(subspace_app, name="subspace")


@app.command()
def validate(config: Config, overrides: Overrides = None, plugin: Plugins = None) -> None:
    """Check an experiment, a grid or an alignment, without running anything: every error at once."""
    from stayaligned.experiments.config.alignment import load_alignment
    from stayaligned.experiments.config.experiment import load_experiment
    from stayaligned.experiments.config.yaml_file import load_yaml
    from stayaligned.experiments.grid import load_grid

    load_plugins(plugin)
    content = load_yaml(config)
    if "data" in content and "model" not in content:
        alignment = load_alignment(str(config), {}, overrides or ())
        out.print(f"{config}: a valid alignment of {alignment.base_model}", soft_wrap=True)
    elif "axes" in content:
        grid = load_grid(config, overrides or ())
        out.print(f"{config}: a valid grid of {len(grid.expand(str(config)))} experiments")
    else:
        experiment = load_experiment(config, overrides or ())
        out.print(f"{config}: a valid experiment ({experiment.arm}, seed {experiment.seed})")


@app.command("list")
def list_components(
    noun: Annotated[
        str | None, typer.Argument(help="defense, judge, task, attack or prompts; all if not given.")
    ] = None,
    plugin: Plugins = None,
) -> None:
    """List the known defenses, judges, tasks, attacks and prompt sets."""
    load_plugins(plugin)
    chosen = [_registry(noun)] if noun else list(_registries().values())
    table = plain_table("kind", "name", "what it does")
    for registry in chosen:
        for name in registry.names():
            table.add_row(registry.kind, name, registry.get(name).summary())
    out.print(table)


@app.command()
def show(
    noun: Annotated[str, typer.Argument(help="defense, judge, task, attack or prompts.")],
    name: Annotated[str, typer.Argument(help="Its name, as `list` prints it.")],
    plugin: Plugins = None,
) -> None:
    """Show a component: what it does, its settings, its paper, its file."""
    import inspect

    load_plugins(plugin)
    registry = _registry(noun)
    component = registry.get(name)
    out.print(f"{registry.kind} {component.name}\n\n{inspect.getdoc(component)}\n")
    table = plain_table("setting", "type", "default")
    for key, info in component.model_fields.items():
        kind = inspect.formatannotation(info.annotation).replace("typing.", "")
        table.add_row(key, kind, "required" if info.is_required() else repr(info.default))
    out.print(table)
    if component.paper:
        out.print(f"\npaper  {component.paper}")
    out.print(f"file   {registry.origin(name)}", soft_wrap=True)


@app.command()
def new(
    noun: Annotated[str, typer.Argument(help="defense, judge, task, attack or prompts.")],
    name: Annotated[str, typer.Argument(help="The new component's name.")],
    directory: Annotated[Path, typer.Option("--dir", help="Where to write NAME.py.")] = Path(),
) -> None:
    """Write a working plug-in file to start from."""
    from stayaligned.cli.scaffold import write_plugin

    path = write_plugin(noun, name, directory)
    out.print(f"wrote {path}; try: stayaligned show {noun} {name} --plugin {path}", soft_wrap=True)


@app.command()
def env() -> None:
    """Print versions and hardware, for a bug report."""
    from stayaligned.core.provenance import versions

    import torch  # isort: skip

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    facts = {**versions(), "platform": sys.platform, "cpus": len(os.sched_getaffinity(0)), "gpu": device}
    for name, value in facts.items():
        out.print(f"{name:<14}{value}")


def _run_grid(grid: Grid, directory: Path, workers: int | None, plugins: list[Path]) -> None:
    from stayaligned.cli.progress import LiveProgress
    from stayaligned.experiments.grid import run_grid
    from stayaligned.hf.training.processes import require_one_process

    require_one_process("a grid")
    with LiveProgress(err) as listener:
        outcome = run_grid(grid, directory, workers=workers, plugins=plugins, listener=listener)
    if outcome.results:
        print_report([directory], directory)
    for name, error in outcome.failures.items():
        err.print(f"failed: {name}: {error}", soft_wrap=True)
    if outcome.failures:
        err.print(f"{len(outcome.failures)} experiment(s) failed; rerun the same command to try them again.")
        raise typer.Exit(EXIT_FAILED if outcome.results else EXIT_BAD_INPUT)


def _registries() -> dict[str, Registry[Any]]:
    from stayaligned.experiments.config.experiment import REGISTRIES

    return {registry.kind: registry for registry in REGISTRIES}


def _registry(noun: str) -> Registry[Any]:
    registries = _registries()
    found = next((registry for kind, registry in registries.items() if noun in (kind, registry.plural)), None)
    if found is None:
        raise StayalignedError(f"unknown noun {noun!r}", hint=f"One of: {', '.join(registries)}.")
    return found
