"""Options and arguments that several commands have."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from stayaligned.core.errors import StayalignedError

Overrides = Annotated[
    list[str] | None, typer.Argument(help="key=value, dotted: training.learning_rate=1e-4 defenses.0.rho=2")
]
Plugins = Annotated[list[Path] | None, typer.Option("--plugin", help="A Python file with components; repeatable.")]
Out = Annotated[Path, typer.Option("--out", help="Output directory; rerunning the same command continues in it.")]
Judges = Annotated[
    list[str] | None,
    typer.Option("--judge", help="A judge's name, or '{name: classifier, model: DIR}'; repeatable."),
]


def load_plugins(paths: Sequence[Path] | None) -> None:
    """Register the components of each plug-in file."""
    if paths:
        from stayaligned.core.component import load_plugin
        from stayaligned.experiments.config.experiment import REGISTRIES

        for path in paths:
            load_plugin(path, REGISTRIES)


def component_specs(texts: Sequence[str], option: str) -> list[Any]:
    """Names, or settings as YAML mappings, given on the command line.

    Raises:
        StayalignedError: if one is neither.
    """
    from stayaligned.experiments.config.yaml_file import parse_value

    found = [parse_value(text) for text in texts]
    for text, value in zip(texts, found, strict=True):
        if not isinstance(value, str | dict):
            raise StayalignedError(
                f"{option} {text!r}: expected a name or a mapping", hint=f"For example {option} '{{name: keyword}}'."
            )
    return found


def parse_share(given: str | float) -> float:
    """A share written as `2%` or `0.02`; an option's default comes as the number that it is.

    Raises:
        typer.BadParameter: if it is neither, or not between 0 and 1.
    """
    text = str(given)
    try:
        value = float(text.removesuffix("%").strip()) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise typer.BadParameter(f"{text!r} is no share: write 2% or 0.02, from 0 to 100%.")
    return value


def share(text: str) -> Any:
    """An option that takes a share; `text` is its help."""
    return typer.Option(parser=parse_share, metavar="SHARE", help=text)
