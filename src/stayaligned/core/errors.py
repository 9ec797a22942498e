"""The exception for errors that a user can fix, and the hint for a misspelt name."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import ValidationError


class StayalignedError(Exception):
    """An error in a file, a setting or a model that the user can fix.

    The command prints it as a message and a hint, without a traceback.

    Args:
        message: what is wrong, naming the file, field or module, and what was expected.
        hint: what to do about it.
        page: the page of `docs/` to read, as `howto/gate`; by default the command prints that of the module which
            raises the error.
    """

    def __init__(self, message: str, *, hint: str | None = None, page: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.page = page

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\nHint: {self.hint}"

    def __reduce__(self) -> tuple[object, ...]:
        # `bench` sends exceptions between processes; the default pickling would lose the hint.
        return (_rebuild, (type(self), self.message, self.hint, self.page))


def _rebuild(cls: type[StayalignedError], message: str, hint: str | None, page: str | None) -> StayalignedError:
    return cls(message, hint=hint, page=page)


def nearest(word: str, known: Collection[str]) -> str:
    """Return "Did you mean 'x'?" for the known word nearest to `word`; empty if none is near."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"Did you mean {close[0]!r}?" if close else ""


def did_you_mean(word: str, known: Collection[str], label: str) -> str:
    """Return the hint for an unknown name: the nearest known name, if one is near, and all known names."""
    every = f"{label[0].upper()}{label[1:]}: {', '.join(known) or 'none'}."
    return f"{nearest(word, known)} {every}".lstrip()


_EXPECTED = {
    "int": "expected a whole number",
    "float": "expected a number",
    "bool": "expected true or false",
    "string": "expected text",
    "none": "expected null (no value)",
    "list": "expected a list",
    "tuple": "expected a list",
    "set": "expected a list",
    "frozen_set": "expected a list",
    "dict": "expected settings (`key: value`)",
    "mapping": "expected settings (`key: value`)",
    "model": "expected settings (`key: value`)",
    "path": "expected a path",
    "finite": "expected a finite number",
}
_BOUNDS = {
    "greater_than_equal": ("ge", "at least"),
    "greater_than": ("gt", "more than"),
    "less_than_equal": ("le", "at most"),
    "less_than": ("lt", "less than"),
}


def expectation(item: Mapping[str, Any]) -> str:
    """Return what a value should be, from an item of a pydantic error."""
    kind, context = str(item["type"]), item.get("ctx", {})
    if kind == "missing":
        return "required, but missing"
    if kind == "value_error":
        return str(context["error"])
    if kind in _BOUNDS:
        name, words = _BOUNDS[kind]
        return f"expected {words} {context[name]:g}"
    if kind == "literal_error":
        return f"expected {str(context['expected']).replace(chr(39), '')}"
    if kind in ("too_short", "too_long", "string_too_short", "string_too_long"):
        what = "characters" if kind.startswith("string") else "items"
        least = "min_length" in context
        return f"expected at {'least' if least else 'most'} {context['min_length' if least else 'max_length']} {what}"
    known = next((text for name, text in _EXPECTED.items() if kind.startswith(f"{name}_")), None)
    return known or f"{item['msg'][0].lower()}{item['msg'][1:]}"


def first_problem(error: ValidationError, whole: str = "") -> str:
    """Return the place and the message of the first problem of a record; `whole` names the record itself."""
    first = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(map(str, first['loc'])) or whole}: {expectation(first)}"
