"""The exception for errors that a user can fix, and the hint for a misspelt name."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class StayalignedError(Exception):
    """An error in a file, a setting or a model that the user can fix.

    The command prints it as a message and a hint, without a traceback.

    Args:
        message: what is wrong, naming the file, field or module, and what was expected.
        hint: what to do about it.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\nHint: {self.hint}"

    def __reduce__(self) -> tuple[object, ...]:
        # `bench` sends exceptions between processes; the default pickling would lose the hint.
        return (_rebuild, (type(self), self.message, self.hint))


def _rebuild(cls: type[StayalignedError], message: str, hint: str | None) -> StayalignedError:
    return cls(message, hint=hint)


def nearest(word: str, known: Collection[str]) -> str:
    """Return "Did you mean 'x'?" for the known word nearest to `word`; empty if none is near."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"Did you mean {close[0]!r}?" if close else ""


def did_you_mean(word: str, known: Collection[str], label: str) -> str:
    """Return the hint for an unknown name: the nearest known name, if one is near, and all known names."""
    every = f"{label[0].upper()}{label[1:]}: {', '.join(known) or 'none'}."
    return f"{nearest(word, known)} {every}".lstrip()


def first_problem(error: ValidationError, whole: str = "") -> str:
    """Return the place and the message of the first problem of a record; `whole` names the record itself."""
    first = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(map(str, first['loc'])) or whole}: {first['msg']}"
