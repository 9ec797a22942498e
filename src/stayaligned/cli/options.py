"""Options and arguments that several commands share, and options derived from the fields of a settings class."""

from __future__ import annotations

import ast
import inspect
import itertools
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_args, get_origin

import typer

from stayaligned.core.errors import StayalignedError

if TYPE_CHECKING:
    from pydantic import BaseModel
    from pydantic.fields import FieldInfo

Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Further settings as key=value, with dots: training.learning_rate=1e-4 defenses.0.rho=2"),
]
Plugins = Annotated[
    list[Path] | None, typer.Option("--plugin", help="A Python file that defines components; repeatable.")
]
Out = Annotated[Path, typer.Option("--out", help="Output directory; rerun the same command to continue in it.")]
Judges = Annotated[
    list[str] | None,
    typer.Option("--judge", help="A judge's name, or '{name: classifier, model: DIR}'; repeatable."),
]

CommandT = TypeVar("CommandT", bound=Callable[..., None])


def field_options(
    model: type[BaseModel],
    *names: str,
    optional: bool = False,
    texts: Mapping[str, str] | None = None,
    **settings: Any,
) -> Callable[[CommandT], CommandT]:
    """Replace the `**` parameter of a command by one option for each named field of `model`.

    An option takes name, type, default and range from the field, and its help from the docstring below the field. A
    field that a command line can't hold, such as a component, becomes text.

    Args:
        model: the settings class.
        names: its fields; all fields if none are named.
        optional: whether every option may be omitted, and is then None instead of the field's default.
        texts: the help of fields whose docstring does not fit the command.
        settings: further arguments of `typer.Option`, for every option.
    """
    docs = {**field_docs(model), **(texts or {})}

    def decorate(command: CommandT) -> CommandT:
        signature = inspect.signature(command, eval_str=True)
        given = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        required = [p for p in given if p.kind is not p.KEYWORD_ONLY or p.default is p.empty]
        options = [
            _field_option(name, model.model_fields[name], docs.get(name, ""), optional, settings)
            for name in names or model.model_fields
        ]
        parameters = [*required, *options, *(p for p in given if p not in required)]
        command.__signature__ = signature.replace(parameters=parameters)  # pyright: ignore[reportFunctionMemberAccess]
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        return command

    return decorate


def _field_option(name: str, field: FieldInfo, doc: str, optional: bool, settings: dict[str, Any]) -> inspect.Parameter:
    kinds = set(get_args(field.annotation) or [field.annotation])
    holdable = kinds <= {str, int, float, bool, NoneType} or get_origin(field.annotation) is Literal
    kind: Any = field.annotation if holdable else str | None
    default = None if optional else inspect.Parameter.empty if field.is_required() else field.default
    if optional:
        kind = kind | None
    flags = [f"--{name.replace('_', '-')}"] if bool in kinds else []
    if "parser" not in settings:
        settings = {"min": _bound(field, "ge"), "max": _bound(field, "le"), **settings}
    option = typer.Option(*flags, help=doc, **settings)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])


def _bound(field: FieldInfo, name: str) -> Any:
    return next((value for part in field.metadata if (value := getattr(part, name, None)) is not None), None)


def field_docs(model: type) -> dict[str, str]:
    """Return the docstring below each field of a class, including the fields that it inherits.

    Read from the source when needed: pydantic's `use_attribute_docstrings` would read it whenever a class is created,
    which adds 0.1 s to the import of all components.
    """
    docs: dict[str, str] = {}
    for base in reversed(model.__mro__):
        if not inspect.get_annotations(base) or base.__module__.startswith("pydantic"):
            continue
        try:
            source = textwrap.dedent(inspect.getsource(base))
        except (OSError, TypeError):
            continue
        definition = next(node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef))
        for field, text in itertools.pairwise(definition.body):
            match field, text:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=str(doc))),
                ):
                    docs[name] = " ".join(doc.split())
                case _:
                    pass
    return docs


def load_plugins(paths: Sequence[Path] | None) -> None:
    """Register the components of each plug-in file."""
    if paths:
        from stayaligned.core.component import load_plugin
        from stayaligned.experiments.config.experiment import REGISTRIES

        for path in paths:
            load_plugin(path, REGISTRIES)


def component_specs(texts: Sequence[str], option: str) -> list[Any]:
    """Parse components given on the command line: names, or mappings of settings in YAML.

    Raises:
        StayalignedError: if a text is neither.
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
    """Parse a share written as `2%` or `0.02`; typer also passes an option's default, which is a number already.

    Raises:
        typer.BadParameter: if it is not a number between 0 and 1.
    """
    text = str(given)
    try:
        value = float(text.removesuffix("%").strip()) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise typer.BadParameter(f"{text!r} is not a share: write 2% or 0.02, from 0 to 100%.")
    return value


SHARE: dict[str, Any] = {"parser": parse_share, "metavar": "SHARE"}
"""Arguments of an option that takes a share."""


def share(text: str) -> Any:
    """Return an option that takes a share, with `text` as its help."""
    return typer.Option(help=text, **SHARE)
