"""Write the reference of commands, settings, components and public names from the code, when the site is built.

A page holds `<!-- from the code: settings -->`; on a code host the comment is invisible. Each writer returns Markdown,
so that headings, links and search work as on any other page.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterator
from functools import cache
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from typer.main import get_command

import stayaligned
from stayaligned.cli import app as command_line
from stayaligned.cli.components import group_of, needs_of
from stayaligned.cli.options import field_docs
from stayaligned.core.component import Component
from stayaligned.experiments.config.alignment import Alignment
from stayaligned.experiments.config.experiment import REGISTRIES, Experiment
from stayaligned.experiments.grid import Grid

if TYPE_CHECKING:
    from sphinx.application import Sphinx
    from sphinx.environment import BuildEnvironment

MARKER = re.compile(r"^<!-- from the code: (\w+)((?: \w+)*) -->$", flags=re.MULTILINE)
MODELS: dict[str, type[BaseModel]] = {"An experiment": Experiment, "A grid": Grid, "An alignment": Alignment}
ARXIV, ARXIV_LINK = re.compile(r"arXiv (\d{4}\.\d{5})"), r"[arXiv \1](https://arxiv.org/abs/\1)"
BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below", "min_length": "length at least"}
LONGEST_DEFAULT = 100
COST = re.compile(r"\bCost: (.+?)(?= Controls?: | Compare with | Its controls? (?:is|are) |$)")
"""The part of a defense's text that says what it costs; the names of its controls follow."""


def commands() -> str:
    """Return the usage, the text and every option of each command."""
    return "\n".join(part for name, command in _all_commands() for part in _command(name, command))


def _all_commands() -> Iterator[tuple[str, Any]]:
    for name, command in get_command(command_line).commands.items():  # type: ignore[attr-defined]
        below = getattr(command, "commands", None)
        if below is None:
            yield name, command
        else:
            yield from ((f"{name} {inner}", below[inner]) for inner in below)


def _command(name: str, command: Any) -> Iterator[str]:
    context = typer.Context(command, info_name=f"stayaligned {name}")
    shown = f"stayaligned {name} [OPTIONS] {' '.join(_left(p, context) for p in _arguments(command))}".rstrip()
    yield f"## stayaligned {name}\n\n```text\n{shown}\n```\n\n{markdown(inspect.cleandoc(command.help or ''))}\n"
    for parameter in [*_arguments(command), *(p for p in command.params if p not in _arguments(command))]:
        record = parameter.get_help_record(context)
        if record is not None:
            yield f"`{record[0].strip()}`\n: {escaped(record[1]) or 'No description.'}\n"


def _arguments(command: Any) -> list[Any]:
    return [parameter for parameter in command.params if parameter.param_type_name == "argument"]


def _left(parameter: Any, context: typer.Context) -> str:
    return parameter.get_help_record(context)[0].split()[0].upper()


def settings() -> str:
    """Return every setting of the YAML files, those of nested mappings included."""
    titles = {model: title for title, model in MODELS.items()}
    return "\n".join(
        f"## {titles.get(model, model.__name__)}\n\n{markdown(inspect.getdoc(model) or '')}\n\n{fields_of(model)}"
        for model in described_models()
    )


@cache
def described_models() -> tuple[type[BaseModel], ...]:
    """Return the files' settings and every mapping below them, those of components included."""
    waiting: list[Any] = [*MODELS.values(), *(each.get(name) for each in REGISTRIES for name in each.names())]
    found: list[type[BaseModel]] = []
    for model in waiting:
        if model not in found:
            found.append(model)
            waiting += [kind for field in model.model_fields.values() for kind in _mappings_in(field.annotation)]
    return tuple(model for model in found if not issubclass(model, Component))


def components() -> str:
    """Return each component with its settings, paper and file, by kind."""
    parts = []
    for registry in REGISTRIES:
        parts.append(f"## {'Prompt sets' if registry.kind == 'prompts' else registry.plural.capitalize()}\n")
        for name in registry.names():
            component = registry.get(name)
            parts.append(f"### {name} ({'prompt set' if registry.kind == 'prompts' else registry.kind})\n")
            parts.append(f"{markdown(inspect.getdoc(component) or '')}\n\n{fields_of(component)}")
            paper = f"Paper: {ARXIV.sub(ARXIV_LINK, escaped(component.paper))}. " if component.paper else ""
            parts.append(f"{paper}Source: `src/{component.__module__.replace('.', '/')}.py`\n")
    return "\n".join(parts)


def defenses() -> str:
    """Return a table of the defenses of each stage: what each does, needs and costs."""
    registry = next(registry for registry in REGISTRIES if registry.kind == "defense")
    tables: dict[str, list[str]] = {}
    for name in registry.names():
        component = registry.get(name)
        text = " ".join((inspect.getdoc(component) or "").split())
        cost = COST.search(text)
        own = [f"`{field}`" for field, each in component.model_fields.items() if each.is_required()]
        needs = ", ".join([*(f"`{need}`" for need in needs_of(component)), *own])
        row = (f"`{name}`", escaped(component.summary()), needs, escaped(cost[1].strip() if cost else ""))
        tables.setdefault(group_of("defense", component), []).append(f"| {' | '.join(row)} |")
    head = "| defense | what it does | needs | cost, beside plain fine-tuning |\n|---|---|---|---|"
    titles = {group: group.partition(": ")[2] for group in tables}
    return "\n".join(
        f"## {titles[g][0].upper()}{titles[g][1:]}\n\n{head}\n" + "\n".join(tables[g]) + "\n" for g in tables
    )


def names(*wanted: str) -> str:
    """Return the documentation of public names from their docstrings."""
    return "\n".join(_name(name) for name in wanted)


def _name(name: str) -> str:
    value = getattr(stayaligned, name)
    options, settings_below = "", ""
    if not inspect.isclass(value):
        directive = "autofunction" if callable(value) and not get_origin(value) else "autodata"
    elif issubclass(value, BaseModel):
        directive, hidden = "autoclass", ", ".join(["model_config", "model_post_init", *value.model_fields])
        options, settings_below = f"   :members:\n   :exclude-members: {hidden}\n", fields_of(value)
    else:
        directive, options = "autoexception" if issubclass(value, Exception) else "autoclass", "   :members:\n"
    directive = f"```{{eval-rst}}\n.. {directive}:: stayaligned.{name}\n{options}```"
    return f"### {name}\n\n{directive}\n\n{settings_below}"


def _hide_signature(_app: Sphinx, _what: str, _name: str, value: Any, *_: Any) -> tuple[str, str] | None:
    """Leave out the arguments of a class of settings: they are listed below it."""
    return ("", "") if inspect.isclass(value) and issubclass(value, BaseModel) else None


def mark_code(lines: list[str]) -> None:
    """Mark an example, and an indented block after a blank line, as code; reStructuredText would see a quotation."""
    for index in range(len(lines) - 1, -1, -1):
        line, above = lines[index], lines[index - 1] if index else ""
        if line.strip() == "Example:" and not lines[index + 1].lstrip().startswith(">>>"):
            lines[index : index + 1] = ["Example::", ""]
        elif line.startswith("    ") and index and not above.strip():
            before = next((text for text in reversed(lines[:index]) if text.strip()), "")
            if not before.startswith(("    ", "- ")):
                lines.insert(index, "::")
                lines.insert(index + 1, "")


def _mark_code(_app: Sphinx, _what: str, _name: str, _value: Any, _options: Any, lines: list[str]) -> None:
    mark_code(lines)


def fields_of(model: type[BaseModel]) -> str:
    """Return a model's fields as a definition list: name, type, range and default, with the meaning below."""
    docs = field_docs(model)
    shown = [
        f"`{name}`: {_facts(field)}\n: {escaped(docs.get(name, '')) or 'See the description above.'}\n"
        for name, field in model.model_fields.items()
    ]
    return "\n".join(shown) if shown else "No settings.\n"


def _facts(field: FieldInfo) -> str:
    bounds = [
        f"{words} {getattr(rule, bound)}"
        for rule in field.metadata
        for bound, words in BOUNDS.items()
        if getattr(rule, bound, None) is not None
    ]
    return ", ".join([type_name(field.annotation), *bounds, _default(field)])


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "**required**"
    if isinstance(value, BaseModel) and not isinstance(value, Component):
        return "default: its own defaults"
    text = json.dumps(value, ensure_ascii=False, default=str)
    return f"default `{text}`" if len(text) <= LONGEST_DEFAULT else "a long default: see the source"


def type_name(kind: Any) -> str:
    """Return a type as YAML shows its values, with a link where the page, or that of components, describes it."""
    if kind in (None, NoneType):
        return "null"
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in inner)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(type_name(value) for value in inner))
    if origin in (list, tuple, set, frozenset):
        return f"list of {type_name(inner[0])}" if inner else "list"
    if origin is dict or kind is dict:
        return "mapping"
    if hasattr(kind, "__value__"):
        return type_name(kind.__value__)
    if hasattr(kind, "__metadata__"):
        return type_name(inner[0])
    if not inspect.isclass(kind):
        return "any"
    for registry in REGISTRIES:
        if registry.accepts(kind):
            noun = "prompt set" if registry.kind == "prompts" else registry.kind
            return f"[{noun}](/docs/reference/components.md)"
    if kind in described_models():
        return f"[{kind.__name__}](/docs/reference/settings.md#{kind.__name__.lower()})"
    simple = {str: "text", bool: "true or false", int: "whole number", float: "number", object: "any"}
    return simple.get(kind, kind.__name__)


def _mappings_in(kind: Any) -> Iterator[type[BaseModel]]:
    if inspect.isclass(kind) and issubclass(kind, BaseModel) and not issubclass(kind, Component):
        yield kind
    for inner in get_args(kind):
        yield from _mappings_in(inner)


def markdown(docstring: str) -> str:
    """Return a docstring as Markdown: paragraphs, and blocks with an indented line unchanged."""
    parts = []
    for paragraph in docstring.split("\n\n"):
        head, _, rest = paragraph.partition("\n")
        if rest.startswith(" ") and head.endswith(":"):
            parts.append(f"{escaped(head)}\n\n```text\n{inspect.cleandoc(rest)}\n```")
        elif "\n " in f"\n{paragraph}":
            parts.append(f"```text\n{inspect.cleandoc(paragraph)}\n```")
        else:
            parts.append(escaped(paragraph))
    return "\n\n".join(parts)


def escaped(text: str) -> str:
    """Return plain text on one line as Markdown; what is between backticks is code."""
    pieces = re.split(r"(`+[^`]+`+)", " ".join(text.split()))
    return "".join(p if p.startswith("`") else re.sub(r"([\\*_<>\[\]{}#|~])", r"\\\1", p) for p in pieces)


WRITERS: dict[str, Callable[..., str]] = {
    "commands": commands,
    "settings": settings,
    "components": components,
    "defenses": defenses,
    "names": names,
}


def replace_markers(text: str) -> str:
    """Return the text of a page with each marker replaced by what its writer returns."""
    return MARKER.sub(lambda match: WRITERS[match[1]](*match[2].split()), text)


def _replace(_: Sphinx, name: str, content: list[str]) -> None:
    if name.startswith("docs/"):
        content[0] = replace_markers(content[0])


def _outdated(_app: Sphinx, environment: BuildEnvironment, *_: set[str]) -> list[str]:
    return [name for name in environment.found_docs if name.startswith("docs/reference/")]


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the step; the reference is written again in every build, since the code may have changed."""
    app.connect("source-read", _replace)
    app.connect("env-get-outdated", _outdated)
    app.connect("autodoc-process-docstring", _mark_code, priority=400)  # before napoleon reads the sections
    app.connect("autodoc-process-signature", _hide_signature)
    return {"parallel_read_safe": True}
