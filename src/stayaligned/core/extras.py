"""The optional packages, and the extra of this package that installs each."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence

from stayaligned.core.errors import StayalignedError

EXTRAS: Mapping[str, Sequence[str]] = {
    "models": ("transformers", "peft", "accelerate", "datasets"),
    "trl": ("trl",),
    "report": ("matplotlib",),
    "endpoint": ("httpx2", "tenacity"),
    "eval": ("lm_eval", "rouge_score", "regex"),
}
"""The modules that each extra of `pyproject.toml` adds; `docs/howto/install.md` says what each is for."""


def require_packages(needed: Mapping[str, Sequence[str]]) -> None:
    """Check that optional modules are installed, without importing them.

    Args:
        needed: the modules that each user of them imports, by the user's name in the message.

    Raises:
        StayalignedError: naming every missing package, what it is for, and the one command that installs them all.
    """
    users: dict[str, list[str]] = {}
    for user, modules in needed.items():
        for module in modules:
            if importlib.util.find_spec(module) is None:
                users.setdefault(module, []).append(user)
    if not users:
        return
    groups: dict[str, list[str]] = {}
    for module, names in users.items():
        groups.setdefault(", ".join(names), []).append(_package(module))
    missing = "; ".join(f"{', '.join(packages)} (for {names})" for names, packages in groups.items())
    extras = [extra for extra, modules in EXTRAS.items() if not users.keys().isdisjoint(modules)]
    ours = {module for modules in EXTRAS.values() for module in modules}
    others = [_package(module) for module in users if module not in ours]
    raise StayalignedError(
        f"not installed: {missing}",
        hint=" ".join(["pip install", *([f"'stayaligned[{','.join(extras)}]'"] if extras else []), *others]),
        page="howto/install",
    )


def _package(module: str) -> str:
    return module.replace("_", "-")
