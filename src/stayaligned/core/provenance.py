"""The code that computed a number: versions of libraries, and the commit of the checkout."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import subprocess
from functools import cache
from pathlib import Path

_VERSIONED = (
    "stayaligned",
    "torch",
    "transformers",
    "peft",
    "trl",
    "safetensors",
    "accelerate",
    "datasets",
    "lm_eval",
    "rouge_score",
)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that can change a number."""
    found = {"python": platform.python_version()}
    for package in _VERSIONED:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


@cache
def commit() -> str:
    """Return the commit of the checkout that this package runs from, with "+" if edited; empty if there is none."""
    here = Path(__file__)

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", "-C", str(here.parent), *arguments], capture_output=True, text=True, check=False)

    try:
        # An installed package may be inside another project's repository, whose commit is meaningless here.
        if git("ls-files", "--error-unmatch", here.name).returncode != 0:
            return ""
        edited = git("status", "--porcelain", "--untracked-files=no", ".").stdout.strip()
        return git("rev-parse", "HEAD").stdout.strip() + ("+" if edited else "")
    except OSError:
        return ""
