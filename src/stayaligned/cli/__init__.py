"""The command: parse the arguments, call one function, print the result."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import traceback
from collections.abc import Generator, Iterator, Mapping
from functools import cache
from typing import Annotated, Any, NamedTuple, NoReturn

import typer
import typer.core

from stayaligned.cli.modes import CommandReply, current_reply, read_modes, replying, with_modes
from stayaligned.cli.pages import docs_of
from stayaligned.core.errors import StayalignedError
from stayaligned.core.text import escape_unencodable

EXIT_BAD_INPUT, EXIT_INTERRUPTED = 2, 130


class _Entry(NamedTuple):
    place: str
    """Where the command's function, or a Typer app with sub-commands, is defined: `module:name`."""
    summary: str
    """The line in `stayaligned --help`; also the first line of the function's docstring."""


_COMMANDS = {
    "init": _Entry("init:init", "Write a configuration to start from"),
    "run": _Entry("experiments:run", "Run one experiment"),
    "bench": _Entry("experiments:bench", "Run a grid of experiments"),
    "demo": _Entry("experiments:demo", "Run the demo: minutes on a CPU, no download"),
    "report": _Entry("output:report", "Write a report of finished runs"),
    "evaluate": _Entry("evaluate:evaluate", "Measure a finished model or adapter"),
    "judge": _Entry("judge:judge", "Judge the completions of a run again"),
    "label": _Entry("label:label", "Label completions, and measure judges"),
    "gate": _Entry("gate:gate", "Compare a candidate with a baseline"),
    "power": _Entry("power:power", "Plan the number of prompts"),
    "align": _Entry("align:align", "Make an aligned model from a base model"),
    "project": _Entry("project:project", "Patch finished fine-tunes with Safe LoRA"),
    "curvature": _Entry("curvature:curvature", "Compare Lisa's rho with the loss's curvature"),
    "validate": _Entry("experiments:validate", "Check a configuration without running it"),
    "doctor": _Entry("doctor:doctor", "Say what will fail and how long it takes"),
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
    for one in target.registered_commands:
        one.callback = with_modes(one.callback) if one.callback else None
    return typer.main.get_command(target)


class _Group(typer.core.TyperGroup):
    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands = _Commands()  # pyright: ignore[reportAttributeAccessIssue]

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        del ctx
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.summary) for name, entry in _COMMANDS.items()])

    def make_context(self, *arguments: Any, **settings: Any) -> Any:
        with _reporting_usage():
            return super().make_context(*arguments, **settings)

    def invoke(self, ctx: Any) -> Any:
        with _reporting_usage():
            return super().invoke(ctx)


@contextlib.contextmanager
def _reporting_usage() -> Generator[None]:
    """Put the message of a wrong option or argument, which the parser prints and ends with, into the reply."""
    try:
        yield
    except Exception as error:
        if isinstance(error, typer.BadParameter.__mro__[1]):  # click's UsageError, wherever typer keeps it
            current_reply().fail(EXIT_BAD_INPUT, error.format_message())  # pyright: ignore[reportAttributeAccessIssue]
        raise


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
    modes = read_modes(sys.argv[1:])
    try:
        with replying(modes) as reply:
            _run(modes.arguments, reply)
    except OSError as error:  # of writing the reply: `_run` raises none
        _print_error(f"error: the output can't be written: {error.strerror or error}")
        sys.exit(EXIT_BAD_INPUT)


def _run(arguments: list[str], reply: CommandReply) -> None:
    try:
        app(arguments, prog_name="stayaligned")  # also as `python -m stayaligned`, for the shell's completion
    except StayalignedError as error:
        _fail(reply, error.message, error.hint, docs_of(error))
    except SystemExit as ended:
        if type(sys.stdout).__name__ == "PacifyFlushWrapper":  # a reader has gone: no failure for help, but no decision
            sys.exit(EXIT_BAD_INPUT if _decides() and not {"-h", "--help"} & {*sys.argv} else 0)
        if ended.code == EXIT_INTERRUPTED:
            resumes = any(name in sys.argv[1:2] for name in _RESUMING)
            stored = "Completed work is stored: rerun the same command to continue."
            again = stored if resumes else "Rerun the same command to start again."
            _print_error(f"Interrupted. {again}")
            reply.fail(EXIT_INTERRUPTED, "Interrupted.", again)
            reply.write()
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
            _fail(reply, f"plug-in {where}: raised {type(error).__name__}: {error}")
        if isinstance(error, ModuleNotFoundError) and error.name == "torch":  # an installation for `gate` alone
            _fail(reply, "not installed: torch, which this command needs", "pip install torch")
        if not isinstance(error, OSError):
            if not _decides():
                raise
            _print_error("".join(traceback.format_exception(error)))
            _fail(reply, f"{type(error).__name__}: {error}")
        _fail(
            reply,
            f"{error.filename or 'system'}: {error.strerror or error}",
            "Completed work is stored: fix this and rerun the same command to continue.",
        )


def _fail(reply: CommandReply, message: str, hint: str | None = None, docs: str | None = None) -> NoReturn:
    """Report an error to the user, and end with the exit code of invalid input."""
    parts = {"error": message, "hint": hint, "docs": docs}
    _print_error(*(f"{name}: {text}" for name, text in parts.items() if text))
    reply.fail(EXIT_BAD_INPUT, message, hint, docs)
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
        from stayaligned.cli.console import errors

        for line in lines:
            errors.print(line, soft_wrap=True)
