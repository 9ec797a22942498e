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

from stayaligned.cli.console import out, plain_table, wrote
from stayaligned.cli.modes import answer
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
    found = [
        (group_of(registry.kind, component), registry.kind, name, component.summary())
        for registry in ([_registry(noun)] if noun else _registries().values())
        for name in registry.names()
        for component in [registry.get(name)]
    ]
    answer(components=[dict(zip(("group", "kind", "name", "summary"), row, strict=True)) for row in found])
    width = max(len(name) for _, _, name, _ in found)
    for group in sorted({row[0] for row in found}, key=[row[0] for row in found].index):
        table = plain_table("", "")
        table.show_header = False
        for _, _, name, summary in (row for row in found if row[0] == group):
            table.add_row(name.ljust(width), summary)
        out.print(group.upper())
        out.print(table)
        out.print("")
    out.print("`stayaligned show KIND NAME` prints the whole text, the settings and the paper of each.")


def group_of(kind: str, component: type[Component]) -> str:
    """The heading under which a component is listed."""
    from stayaligned.defenses import TrainingDefense

    if kind != "defense":
        return "prompt sets" if kind == "prompts" else f"{kind}s"
    if component.summary().startswith("Control:"):
        return "defenses: controls, which patches are compared with"
    return f"defenses: {'during' if issubclass(component, TrainingDefense) else 'after'} fine-tuning"


def show(
    noun: Noun,
    name: Annotated[str, typer.Argument(help="The name, as `list` prints it.", autocompletion=_complete_name)],
    plugin: Plugins = None,
) -> None:
    """Show what a component does and its settings.

    For each setting: name, type, default and meaning. Then, for a defense, the settings of an experiment that it needs;
    the paper and the source file.
    """
    load_plugins(plugin)
    registry = _registry(noun)
    component = registry.get(name)
    answer(
        kind=registry.kind,
        name=component.name,
        text=inspect.getdoc(component) or "",
        settings=_setting_values(component),
        needs=needs_of(component),
        paper=component.paper,
        file=registry.origin(name),
    )
    width = min(out.width, 120)
    out.print(f"{registry.kind} {component.name}\n", soft_wrap=True)
    out.print(_wrapped(inspect.getdoc(component) or "", width) + "\n", soft_wrap=True)
    out.print(_settings(component, width), soft_wrap=True)
    if needs := needs_of(component):
        out.print(f"needs  {', '.join(needs)}", soft_wrap=True)
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
    wrote(path, f"try: stayaligned show {noun} {name} --plugin {path}")


def env() -> None:
    """Print versions and hardware.

    Include the output in a bug report.
    """
    from stayaligned.core.provenance import versions

    import torch  # isort: skip

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    facts = {**versions(), "platform": sys.platform, "cpus": len(os.sched_getaffinity(0)), "gpu": device}
    answer(**facts)
    for name, value in facts.items():
        out.print(f"{name:<14}{value}")


def needs_of(component: type[Component]) -> list[str]:
    """The settings of an experiment that a defense needs beside its own; none for other components."""
    given = {"alignment_data": "needs_alignment_data", "base_model": "needs_base"}
    return [setting for setting, name in given.items() if getattr(component, name, False)]


def _setting_values(component: type[Component]) -> list[dict[str, Any]]:
    """The settings of a component: name, type, default, whether it is required, and meaning of each."""
    docs = field_docs(component)
    return [
        {
            "name": name,
            "type": _type_name(field.annotation),
            "required": field.is_required(),
            "default": None if field.is_required() else field.get_default(call_default_factory=True),
            "text": docs.get(name, ""),
        }
        for name, field in component.model_fields.items()
    ]


def _settings(component: type[Component], width: int) -> str:
    """The settings of a component: a line with name, type and default for each, and its meaning below."""
    lines, indent = ["settings"], " " * 6
    for one in _setting_values(component):
        value = json.dumps(one["default"], ensure_ascii=False, default=str)
        default = "required" if one["required"] else f"default {value}"
        lines.append(f"  {one['name']}: {one['type']}, {default}")
        lines += textwrap.wrap(one["text"], width, initial_indent=indent, subsequent_indent=indent, **_WHOLE_WORDS)
    return "\n".join([*lines, ""]) if len(lines) > 1 else "no settings\n"


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
