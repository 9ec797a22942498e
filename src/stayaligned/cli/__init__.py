"""The command: parse the arguments, call one function, print the result."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import traceback
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Annotated, Any, NamedTuple

import typer
import typer.core

from stayaligned.core.errors import StayalignedError
from stayaligned.core.text import escape_unencodable

EXIT_BAD_INPUT, EXIT_INTERRUPTED = 2, 130


class _Entry(NamedTuple):
    place: str
    """Where the command's function, or a Typer app with sub-commands, is defined: `module:name`."""
    summary: str
    """The line in `stayaligned --help`; also the first line of the function's docstring."""


_COMMANDS = {
    "run": _Entry("experiments:run", "Run one experiment"),
    "bench": _Entry("experiments:bench", "Run a grid of experiments"),
    "demo": _Entry("experiments:demo", "Run the demo: minutes on a CPU, no download"),
    "report": _Entry("output:report", "Write a report of finished runs"),
    "evaluate": _Entry("evaluate:evaluate", "Measure a finished model or adapter"),
    "judge": _Entry("judge:judge", "Judge the completions of a run again"),
    "gate": _Entry("gate:gate", "Compare a candidate with a baseline"),
    "power": _Entry("power:power", "Plan the number of prompts"),
    "align": _Entry("align:align", "Make an aligned model from a base model"),
    "project": _Entry("project:project", "Patch finished fine-tunes with Safe LoRA"),
    "curvature": _Entry("curvature:curvature", "Compare Lisa's rho with the loss's curvature"),
    "validate": _Entry("experiments:validate", "Check a configuration without running it"),
    "list": _Entry("components:list_components", "List the available components"),
    "show": _Entry("components:show", "Show what a component does and its settings"),
    "new": _Entry("components:new", "Write a plug-in file to start from"),
    "env": _Entry("components:env", "Print versions and hardware"),
    "subspace": _Entry("subspace:subspace_app", "Build and show subspace files"),
}


_RESUMING = ("run", "bench", "demo", "evaluate", "judge", "align")
"""Commands that continue where an earlier run of the same command stopped."""


class _Commands(Mapping[str, Any]):
    """The commands by name. A command's module is imported when the command is used, so that `--help` is quick."""

    def __getitem__(self, name: str) -> Any:
        return _load(_COMMANDS[name], name)

    def __iter__(self) -> Iterator[str]:
        return iter(_COMMANDS)

    def __len__(self) -> int:
        return len(_COMMANDS)


@cache
def _load(entry: _Entry, name: str) -> Any:
    module, _, attribute = entry.place.partition(":")
    target = getattr(importlib.import_module(f"stayaligned.cli.{module}"), attribute)
    if not isinstance(target, typer.Typer):
        function, target = target, typer.Typer(add_completion=False, rich_markup_mode=None)
        target.command(name)(function)
    return typer.main.get_command(target)


class _Group(typer.core.TyperGroup):
    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands = _Commands()  # pyright: ignore[reportAttributeAccessIssue]

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        del ctx
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.summary) for name, entry in _COMMANDS.items()])


app = typer.Typer(
    name="stayaligned",
    cls=_Group,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"stayaligned {version('stayaligned')}")
        raise typer.Exit


@app.callback()
def _app(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Fine-tune an aligned language model, and show that it stayed aligned."""
    del version


def main() -> None:
    """Run the command; an error that the user can fix is one message and exit code 2, Ctrl-C exit code 130.

    An error of this program, exit code 1 with Python's traceback, is exit code 2 for `gate`, whose 1 means "fail".
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    escape_unencodable()
    try:
        app(prog_name="stayaligned")  # also as `python -m stayaligned`, for the shell's completion
    except StayalignedError as error:
        _print_error(f"error: {error.message}", *([f"hint: {error.hint}"] if error.hint else []))
        sys.exit(EXIT_BAD_INPUT)
    except SystemExit as ended:
        if type(sys.stdout).__name__ == "PacifyFlushWrapper":  # a reader has gone: no failure for help, but no decision
            sys.exit(EXIT_BAD_INPUT if _decides() and not {"-h", "--help"} & {*sys.argv} else 0)
        if ended.code == EXIT_INTERRUPTED:
            resumes = any(name in sys.argv[1:2] for name in _RESUMING)
            stored = "Completed work is stored: rerun the same command to continue."
            _print_error(f"Interrupted. {stored if resumes else 'Rerun the same command to start again.'}")
            sys.stdout.flush()
            sys.stderr.flush()
            # An interrupt inside an exec (while a dataclass is being created, say) makes Python end itself by the
            # signal, whatever the exit code. All cleanup is done by now.
            os._exit(EXIT_INTERRUPTED)
        raise
    except Exception as error:
        culprit = _plugin_frame(error)
        if culprit is not None:
            _print_error("".join(traceback.format_exception(error)).rstrip())
            where = f"{culprit.filename}, line {culprit.lineno}, in {culprit.name}"
            _print_error(f"error: plug-in {where}: raised {type(error).__name__}: {error}")
            sys.exit(EXIT_BAD_INPUT)
        if not isinstance(error, OSError):
            if not _decides():
                raise
            _print_error("".join(traceback.format_exception(error)), f"error: {type(error).__name__}: {error}")
            sys.exit(EXIT_BAD_INPUT)
        _print_error(
            f"error: {error.filename or 'system'}: {error.strerror or error}",
            "hint: Completed work is stored: fix this and rerun the same command to continue.",
        )
        sys.exit(EXIT_BAD_INPUT)


def _decides() -> bool:
    """Whether the command's exit codes 0 and 1 are decisions."""
    return sys.argv[1:2] == ["gate"]


def _plugin_frame(error: Exception) -> traceback.FrameSummary | None:
    """Return the innermost place in a plug-in file (`--plugin`) that an error passed."""
    frames = [*traceback.walk_tb(error.__traceback__)]
    names = [str(frame.f_globals.get("__name__", "")) for frame, _ in frames]
    inside = [index for index, name in enumerate(names) if name.startswith("stayaligned_plugin_")]
    return traceback.extract_tb(error.__traceback__)[inside[-1]] if inside else None


def _print_error(*lines: str) -> None:
    """Print to stderr. Where even this fails, for lack of memory say, the exit code still tells of the error."""
    with contextlib.suppress(Exception):
        from stayaligned.cli.console import err

        for line in lines:
            err.print(line, soft_wrap=True)
