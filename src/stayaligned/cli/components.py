"""`stayaligned list`, `show` and `new`, for components; `env`, for bug reports."""

from __future__ import annotations

import inspect
import json
import os
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

import typer

from stayaligned.cli.console import out, plain_table
from stayaligned.cli.options import Plugins, field_docs, load_plugins
from stayaligned.cli.scaffold import NOUNS, write_plugin
from stayaligned.core.errors import StayalignedError

if TYPE_CHECKING:
    from stayaligned.core.component import Component, Registry


def _complete_noun(incomplete: str) -> list[str]:
    return [noun for noun in NOUNS if noun.startswith(incomplete)]


def _complete_name(ctx: typer.Context, incomplete: str) -> list[str]:
    try:
        names = _registry(ctx.params.get("noun") or "").names()
    except StayalignedError:
        return []
    return [name for name in names if name.startswith(incomplete)]


Noun = Annotated[str, typer.Argument(help="defense, judge, task, attack or prompts.", autocompletion=_complete_noun)]


def list_components(
    noun: Annotated[
        str | None,
        typer.Argument(help="defense, judge, task, attack or prompts; by default all.", autocompletion=_complete_noun),
    ] = None,
    plugin: Plugins = None,
) -> None:
    """List the available components.

    Defenses, judges, tasks, attacks and prompt sets: the package's own, and those of plug-ins.
    """
    load_plugins(plugin)
    table = plain_table("kind", "name", "what it does")
    for registry in [_registry(noun)] if noun else _registries().values():
        for name in registry.names():
            table.add_row(registry.kind, name, registry.get(name).summary())
    out.print(table)


def show(
    noun: Noun,
    name: Annotated[str, typer.Argument(help="The name, as `list` prints it.", autocompletion=_complete_name)],
    plugin: Plugins = None,
) -> None:
    """Show what a component does and its settings.

    For each setting: name, type, default and meaning. Then the paper and the source file.
    """
    load_plugins(plugin)
    registry = _registry(noun)
    component = registry.get(name)
    width = min(out.width, 120)
    out.print(f"{registry.kind} {component.name}\n", soft_wrap=True)
    out.print(_wrapped(inspect.getdoc(component) or "", width) + "\n", soft_wrap=True)
    out.print(_settings(component, width), soft_wrap=True)
    if component.paper:
        out.print(f"paper  {component.paper}", soft_wrap=True)
    out.print(f"file   {registry.origin(name)}", soft_wrap=True)


def new(
    noun: Noun,
    name: Annotated[str, typer.Argument(help="The new component's name.")],
    directory: Annotated[Path, typer.Option("--dir", help="The directory in which to write NAME.py.")] = Path(),
) -> None:
    """Write a plug-in file to start from.

    The file is a working component of its kind; pass it to other commands with --plugin.
    """
    if noun in NOUNS and name in (known := _registry(noun)).names():
        raise StayalignedError(
            f"{noun} {name!r} exists already ({known.origin(name)})", hint=f"Choose another name: my_{name}."
        )
    path = write_plugin(noun, name, directory)
    out.print(f"wrote  {path}; try: stayaligned show {noun} {name} --plugin {path}", soft_wrap=True)


def env() -> None:
    """Print versions and hardware.

    Include the output in a bug report.
    """
    from stayaligned.core.provenance import versions

    import torch  # isort: skip

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    facts = {**versions(), "platform": sys.platform, "cpus": len(os.sched_getaffinity(0)), "gpu": device}
    for name, value in facts.items():
        out.print(f"{name:<14}{value}")


def _settings(component: type[Component], width: int) -> str:
    """The settings of a component: a line with name, type and default for each, and its meaning below."""
    if not component.model_fields:
        return "no settings\n"
    docs = field_docs(component)
    lines = ["settings"]
    for name, field in component.model_fields.items():
        value = json.dumps(field.get_default(call_default_factory=True), ensure_ascii=False, default=str)
        default = "required" if field.is_required() else f"default {value}"
        lines.append(f"  {name}: {_type_name(field.annotation)}, {default}")
        indent = " " * 6
        lines += textwrap.wrap(
            docs.get(name, ""), width, initial_indent=indent, subsequent_indent=indent, **_WHOLE_WORDS
        )
    return "\n".join([*lines, ""])


def _type_name(annotation: Any) -> str:
    """A type as YAML shows its values: `coupled | decoupled` for a Literal, `float | null` for an optional number."""
    options = get_args(annotation)
    if get_origin(annotation) is Literal:
        return " | ".join(str(option) for option in options)
    if type(None) in options:
        return " | ".join([*(_type_name(option) for option in options if option is not type(None)), "null"])
    return inspect.formatannotation(annotation).replace("typing.", "")


_WHOLE_WORDS: Any = {"break_long_words": False, "break_on_hyphens": False}


def _wrapped(text: str, width: int) -> str:
    """Text with its paragraphs filled to `width`; paragraphs with an indented line, such as formulas, are unchanged."""
    paragraphs = text.split("\n\n")
    return "\n\n".join(p if "\n " in f"\n{p}" else textwrap.fill(p, width, **_WHOLE_WORDS) for p in paragraphs)


def _registries() -> dict[str, Registry[Any]]:
    from stayaligned.experiments.config.experiment import REGISTRIES

    return {registry.kind: registry for registry in REGISTRIES}


def _registry(noun: str) -> Registry[Any]:
    registries = _registries()
    found = next((registry for kind, registry in registries.items() if noun in (kind, registry.plural)), None)
    if found is None:
        raise StayalignedError(f"unknown noun {noun!r}", hint=f"One of: {', '.join(registries)}.")
    return found
