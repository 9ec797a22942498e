"""The tests of what the installed hosts can't do: `tests/hosts/limits.toml`."""

import importlib.metadata
import tomllib
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement

FILE = Path(__file__).parents[1] / "hosts" / "limits.toml"


class Limit(NamedTuple):
    """What hosts before a version can't do."""

    needs: Requirement
    why: str
    tests: tuple[str, ...]
    """Beginnings of test ids."""

    def is_met(self) -> bool:
        try:
            return self.needs.specifier.contains(importlib.metadata.version(self.needs.name), prereleases=True)
        except importlib.metadata.PackageNotFoundError:
            return False


def read_limits() -> list[Limit]:
    """Return all limits."""
    found = tomllib.loads(FILE.read_text(encoding="utf-8"))["limit"]
    return [Limit(Requirement(each["needs"]), each["why"], tuple(each["tests"])) for each in found]


def out_of_reach() -> tuple[str, ...]:
    """Return the beginnings of the ids of the tests that the installed hosts can't pass."""
    return tuple(test for limit in read_limits() if not limit.is_met() for test in limit.tests)
