"""The one exception a user can cause: printed as a sentence and a hint, never as a traceback."""

from __future__ import annotations


class StayalignedError(Exception):
    """Something outside the program is wrong: a file, a setting, a model that does not fit.

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
        # Exceptions cross process borders in `bench`; the default would lose the hint.
        return (_rebuild, (type(self), self.message, self.hint))


def _rebuild(cls: type[StayalignedError], message: str, hint: str | None) -> StayalignedError:
    return cls(message, hint=hint)
