"""`--json` and `--quiet` of every command: what goes to stdout, and what an error looks like to a program.

stdout has the answer alone, as text or, with `--json`, as one JSON document. Progress, notes, names of written files
and errors go to stderr; `--quiet` leaves only the errors.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import os
import sys
from collections.abc import Callable, Generator, Sequence
from typing import IO, Annotated, Any, NamedTuple, TextIO

import typer

_VERSION = 1
"""Version of the documents; raised when a field is removed or changes its meaning."""


class Modes(NamedTuple):
    """What the command line asks for."""

    arguments: list[str]
    """The arguments to parse."""
    command: str
    """The command and its sub-command, joined by a hyphen; empty if none is given."""
    json: bool
    """Whether stdout gets a JSON document."""
    quiet: bool
    """Whether stderr gets errors alone."""


def read_modes(arguments: Sequence[str]) -> Modes:
    """Read the modes before anything is parsed, so that a wrong option is reported as JSON too."""
    parsed = [*arguments]
    own = parsed[: parsed.index("--")] if "--" in parsed else parsed
    as_json = "--json" in own
    if own[:1] == ["gate"]:  # its `--json FILE` writes a file; `--json` alone, or with `-`, is stdout
        for place in [i for i, word in enumerate(own) if word == "--json"]:
            if place + 1 == len(own) or (own[place + 1].startswith("-") and own[place + 1] != "-"):
                parsed[place] = "--json=-"
        as_json = "--json=-" in parsed or (as_json and "-" in own)
    command = "-".join(own[: 2 if own[:1] == ["subspace"] else 1])
    return Modes(parsed, command if not command.startswith("-") else "", as_json, bool({"--quiet", "-q"} & {*own}))


def with_modes(command: Callable[..., None]) -> Callable[..., None]:
    """Add `--json` (unless the command has its own) and `--quiet` to a command's options."""

    @functools.wraps(command)
    def run(*, json: bool = False, quiet: bool = False, **values: Any) -> None:
        del json, quiet  # `main` has read them
        command(**values)

    signature = inspect.signature(command, eval_str=True)
    given = [*signature.parameters.values()]
    added = [("json", _JSON)] * ("json_file" not in signature.parameters) + [("quiet", _QUIET)]
    given += [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=a) for name, a in added]
    run.__signature__ = signature.replace(parameters=given)  # pyright: ignore[reportAttributeAccessIssue]
    run.__annotations__ = {p.name: p.annotation for p in given}
    return run


_JSON = Annotated[bool, typer.Option("--json", help="Print the answer, or the error, as one JSON document.")]
_QUIET = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print the answer and errors alone: no progress, no notes, no file names.")
]


class CommandReply:
    """What one call of the command answers: the fields of its JSON document, or an error."""

    def __init__(self, modes: Modes, stream: TextIO | None = None) -> None:
        self.modes = modes
        self.fields: dict[str, Any] = {}
        self.notes: list[str] = []
        self.files: list[str] = []
        self._error: dict[str, Any] | None = None
        self._stream = stream

    def fail(self, code: int, message: str, hint: str | None = None, docs: str | None = None) -> None:
        """Replace the answer by an error; the first one counts."""
        if self._error is None:
            self._error = {"message": message, "hint": hint, "docs": docs, "exit_code": code}

    def write(self) -> None:
        """Write the document, once, in ASCII; a reader that has gone loses it.

        Raises:
            OSError: if the stream can't be written for another reason.
        """
        stream, self._stream = self._stream, None
        if not self.modes.json or stream is None:
            return
        name, content = self.modes.command, {**self.fields, "notes": self.notes, "files": self.files}
        if self._error is not None:
            name, content = "error", {"command": name, "error": self._error}
        try:
            stream.write(json.dumps({"schema": f"stayaligned.{name}/{_VERSION}", **_plain(content)}, indent=2) + "\n")
            stream.flush()
        except BrokenPipeError:
            discard(stream)


_current = CommandReply(Modes([], "", json=False, quiet=False))


def current_reply() -> CommandReply:
    """Return the reply of the call that runs."""
    return _current


def answer(**fields: Any) -> None:
    """Set fields of the JSON document: plain values, records, dataclasses or paths."""
    _current.fields.update(fields)


def _plain(content: dict[str, Any]) -> dict[str, Any]:
    """Return records, paths and tuples as JSON has them, and NaN and infinity as null."""
    from pydantic_core import to_json

    return json.loads(to_json(content, inf_nan_mode="null", fallback=str))


@contextlib.contextmanager
def replying(modes: Modes) -> Generator[CommandReply]:
    """Collect the reply of the block, and write it at its end.

    With `--json`, whatever else prints to stdout, libraries and worker processes too, prints to stderr.
    """
    global _current
    with _stdout_apart(modes.json) as stream:
        _current = CommandReply(modes, stream)
        try:
            yield _current
        except Exception as error:
            _current.fail(1, f"{type(error).__name__}: {error}")
            raise
        finally:
            _current.write()


@contextlib.contextmanager
def _stdout_apart(wanted: bool) -> Generator[TextIO]:
    """Yield a stream to stdout, while all others print to stderr if it is wanted."""
    if not wanted:
        yield sys.stdout
        return
    stream, before = sys.stdout, None
    with contextlib.suppress(OSError, ValueError):  # streams of tests and notebooks have no descriptor
        if sys.__stdout__ is not None and stream.fileno() == 1:
            before = os.dup(1)
            os.dup2(2, 1)
            stream = os.fdopen(os.dup(before), "w", encoding="ascii")
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield stream
    finally:
        if before is not None:
            os.dup2(before, 1)
            os.close(before)


def discard(stream: IO[str]) -> None:
    """Let Python discard at its end what a stream still holds: else its exit code is 120.

    Some streams, of tests or notebooks, have no descriptor and hold nothing.
    """
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
