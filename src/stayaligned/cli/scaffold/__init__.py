"""Plug-in files to start from: one working file per noun, for `stayaligned new`."""

from __future__ import annotations

import keyword
import re
import sys
from importlib.resources import files
from pathlib import Path
from string import Template

from stayaligned.core.errors import StayalignedError
from stayaligned.core.files import write_text

NOUNS = ("defense", "judge", "task", "attack", "prompts")


def write_plugin(noun: str, name: str, directory: Path) -> Path:
    """Write `directory/name.py`, a working component of that noun, and return its path.

    Raises:
        StayalignedError: if the noun is unknown, the name is not a Python name, or the file exists.
    """
    if noun not in NOUNS:
        raise StayalignedError(f"unknown noun {noun!r}", hint=f"One of: {', '.join(NOUNS)}.")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name) or keyword.issoftkeyword(name):
        raise StayalignedError(
            f"{name!r} cannot name a {noun}", hint=f"Use lower-case letters, digits and underscores: my_{noun}."
        )
    if name in sys.stdlib_module_names:
        raise StayalignedError(
            f"{name!r} is a module of Python: a file {name}.py would hide it", hint=f"Choose another name: my_{name}."
        )
    path = directory / f"{name}.py"
    if path.exists():
        raise StayalignedError(f"{path} exists already", hint="Choose another name or directory.")
    class_name = "".join(part.capitalize() for part in name.split("_"))
    template = Template((files(__name__) / f"{noun}.py.txt").read_text(encoding="utf-8"))
    write_text(path, template.substitute(name=name, class_name=class_name))
    return path
