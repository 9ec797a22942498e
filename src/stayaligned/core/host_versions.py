"""The versions of the host libraries that this package works with; `make hosts` tests both ends of each range."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping

from stayaligned.core.errors import StayalignedError

RANGES: Mapping[str, str] = {
    "transformers": ">=5.6,<6",
    "peft": ">=0.18,<0.22",
    "accelerate": ">=1.11",
    "datasets": ">=4.0",
    "huggingface-hub": ">=1.5",
    "trl": ">=1.9,<2",
}
"""Versions by package, as in pyproject.toml; TRL is needed only for its own trainers."""


def installed_version(package: str) -> str | None:
    """Return the installed version of a package; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def require_versions(*packages: str, otherwise: str = "") -> None:
    """Check that the host libraries that are installed are in their ranges (`extras` checks that they are installed).

    Args:
        packages: names in `RANGES`.
        otherwise: what to do instead of installing another version, appended to the hint.

    Raises:
        StayalignedError: naming each version outside its range, with the command that installs one within.
    """
    from packaging.specifiers import SpecifierSet

    found = {package: version for package in packages if (version := installed_version(package)) is not None}
    wrong = [
        package
        for package, version in found.items()
        if not SpecifierSet(RANGES[package]).contains(version, prereleases=True)
    ]
    if wrong:
        install = " ".join(f"'{package}{RANGES[package]}'" for package in wrong)
        raise StayalignedError(
            "; ".join(f"{package} {found[package]} is not supported ({RANGES[package]})" for package in wrong),
            hint=f"pip install {install}{f'; or {otherwise}' if otherwise else ''}",
            page="reference/hosts",
        )
