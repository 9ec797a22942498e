"""Which code computed a number: the versions of the libraries and the commit of the checkout."""

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
    """The versions of everything that can change a number."""
    found = {"python": platform.python_version()}
    for package in _VERSIONED:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


@cache
def commit() -> str:
    """The commit of the checkout that this package runs from, with "+" if it was edited since; else empty."""
    here = Path(__file__)

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", "-C", str(here.parent), *arguments], capture_output=True, text=True, check=False)

    try:
        # An installed package may lie inside somebody else's repository, whose commit says nothing about it.
        if git("ls-files", "--error-unmatch", here.name).returncode != 0:
            return ""
        edited = git("status", "--porcelain", "--untracked-files=no", ".").stdout.strip()
        return git("rev-parse", "HEAD").stdout.strip() + ("+" if edited else "")
    except OSError:
        return ""
