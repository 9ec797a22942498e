"""Settings of transformers, TRL and PEFT, and their types, read from their source files without importing them.

Importing `TrainingArguments` takes five seconds and imports torch; a wrong setting in a configuration must be reported
in a fraction of a second. The classes are dataclasses, so their annotated assignments are their settings.
"""

from __future__ import annotations

import ast
import importlib.util
import math
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args

from pydantic import Field, TypeAdapter, ValidationError

from stayaligned.core.errors import nearest

Host = Literal["transformers", "sft", "lora"]

_SOURCES: dict[Host, tuple[tuple[str, str, str], ...]] = {
    "transformers": (("transformers", "training_args.py", "TrainingArguments"),),
    "sft": (
        ("transformers", "training_args.py", "TrainingArguments"),
        ("trl", "trainer/base_config.py", "_BaseConfig"),
        ("trl", "trainer/sft_config.py", "SFTConfig"),
    ),
    "lora": (
        ("peft", "tuners/lora/config.py", "LoraConfig"),
        ("peft", "config.py", "PeftConfig"),
        ("peft", "config.py", "PeftConfigMixin"),
    ),
}
_ENUMS: dict[Host, tuple[tuple[str, str], ...]] = {
    "transformers": (("transformers", "trainer_utils.py"), ("transformers", "training_args.py")),
    "sft": (("transformers", "trainer_utils.py"), ("transformers", "training_args.py")),
    "lora": (("peft", "utils/peft_types.py"),),
}
"""Files with the enums that annotate settings, such as `SaveStrategy`."""
_ANNOTATIONS = {"fsdp": "bool | str | list[str] | None", "lora_alpha": "float"}
"""Types that the hosts take beyond those that they annotate."""
_RANGES: Mapping[str, tuple[float, float]] = {
    "learning_rate": (0, math.inf),
    "weight_decay": (0, math.inf),
    "adam_beta1": (0, 1),
    "adam_beta2": (0, 1),
    "adam_epsilon": (0, math.inf),
    "per_device_train_batch_size": (1, math.inf),
    "gradient_accumulation_steps": (1, math.inf),
    "warmup_steps": (0, math.inf),
    "r": (1, math.inf),
    "lora_dropout": (0, 1),
}
"""Ranges that the annotations do not say, and outside of which the hosts fail only when training begins."""
_LISTED = 12
"""Most choices that an error lists."""
_WORDS = {"yes": True, "on": True, "no": False, "off": False}
"""What YAML 1.1 reads as true and false, and YAML 1.2 as text."""


class NotInstalledError(Exception):
    """The library whose settings are wanted is not installed."""


@cache
def setting_types(host: Host) -> Mapping[str, Any]:
    """Return the fields of TrainingArguments ("transformers"), SFTConfig ("sft") or LoraConfig ("lora").

    Returns:
        The type of each field by its name; `Any` for types that no YAML value has.

    Raises:
        NotInstalledError: if the library is not installed.
    """
    enums = {name: values for source in _ENUMS[host] for name, values in _enums(*source)}
    fields = {name: node for source in _SOURCES[host] for name, node in _dataclass_fields(*source)}
    fields |= {name: ast.Constant(text) for name, text in _ANNOTATIONS.items() if name in fields}
    return {name: _type_of(node, enums) for name, node in fields.items()}


def read_setting(host: Host, name: str, value: Any) -> Any:
    """Return the value of a setting, in which the words yes, no, on and off are true and false if it is not text.

    Raises:
        ValueError: if the value is of another type, not one of the choices, or out of range.
    """
    kind = setting_types(host)[name]
    if isinstance(value, str) and value.lower() in _WORDS and bool in _parts(kind) and str not in _parts(kind):
        value = _WORDS[value.lower()]
    try:
        _adapter(host, name).validate_python(value, strict=True)
    except ValidationError:
        choices = [choice for part in _parts(kind) for choice in _choices(part)]
        found = f"text {value!r}" if isinstance(value, str) and not choices else repr(value)
        hint = f". {nearest(value, choices)}" if isinstance(value, str) and choices else ""
        raise ValueError(f"expected {' or '.join(_describe(kind))}, found {found}{hint}".rstrip(". ")) from None
    low, high = _RANGES.get(name, (-math.inf, math.inf))
    if isinstance(value, int | float) and not low <= value <= high:
        raise ValueError(f"{value} is not {f'{low} or more' if high == math.inf else f'between {low} and {high}'}")
    return value


@cache
def _adapter(host: Host, name: str) -> TypeAdapter[Any]:
    return TypeAdapter(setting_types(host)[name])


def _dataclass_fields(package: str, file: str, class_name: str) -> Iterator[tuple[str, ast.expr]]:
    """Yield the name and the annotation of each field."""
    for node in _read_classes(package, file):
        if node.name == class_name:
            yield from (
                (field.target.id, field.annotation)
                for field in node.body
                if isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and "ClassVar" not in ast.unparse(field.annotation)
                and "init=False" not in ast.unparse(field.value or ast.Constant(None))
            )
            return
    raise AttributeError(f"{package}/{file} has no class {class_name}")


def _enums(package: str, file: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield the name and the values of each enum of text in a file."""
    for node in _read_classes(package, file):
        if any(ast.unparse(base).endswith("Enum") for base in node.bases):
            values = [field.value for field in node.body if isinstance(field, ast.Assign)]
            yield node.name, tuple(value.value for value in values if isinstance(value, ast.Constant))  # pyright: ignore


@cache
def _read_classes(package: str, file: str) -> list[ast.ClassDef]:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise NotInstalledError
    tree = ast.parse((Path(spec.origin).parent / file).read_text(encoding="utf-8"))
    return [node for node in tree.body if isinstance(node, ast.ClassDef)]


# ---- types --------------------------------------------------------------------------------------------------------

_PLAIN: Mapping[str, Any] = {
    "int": int,
    "float": Annotated[float, Field(allow_inf_nan=False)],
    "str": str,
    "bool": bool,
    "dict": dict,
    "list": list,
    "None": None,
}
_NAMES: Mapping[Any, str] = {
    int: "an integer",
    _PLAIN["float"]: "a number",
    str: "text",
    bool: "true or false",
    dict: "a mapping",
    list: "a list",
    type(None): "null",
}


def _type_of(node: ast.expr, enums: Mapping[str, tuple[str, ...]]) -> Any:
    """Return the type that an annotation names; `Any` for what is not built of plain types, choices and enums."""
    match node:
        case ast.Constant(value=None):
            return None
        case ast.Constant(value=str() as text):
            return _type_of(ast.parse(text, mode="eval").body, enums)
        case ast.Name(id=name):
            return Literal[enums[name]] if name in enums else _PLAIN.get(name, Any)
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _union([_type_of(left, enums), _type_of(right, enums)])
        case ast.Subscript(value=ast.Name(id=name), slice=inner):
            return _generic(name, list(inner.elts) if isinstance(inner, ast.Tuple) else [inner], enums)
        case _:
            return Any


def _generic(name: str, inner: list[ast.expr], enums: Mapping[str, tuple[str, ...]]) -> Any:
    if name == "Literal":
        choices = tuple(ast.literal_eval(choice) for choice in inner)
        if any("[" in str(choice) for choice in choices):  # "pissa_niter_[number of iters]"
            pattern = "|".join(re.sub(r"\[.*\]", ".+", str(choice)) for choice in choices)
            return Annotated[str, Field(pattern=f"^({pattern})$")]
        return Literal[choices]
    parts = [_type_of(part, enums) for part in inner]
    match name:
        case "Optional":
            return _union([*parts, None])
        case "Union":
            return _union(parts)
        case "list" | "tuple":  # YAML has no tuples; their lengths are left to the host
            return list[_union(parts)]  # pyright: ignore[reportInvalidTypeArguments]
        case "dict":
            return dict[parts[0], parts[1]]  # pyright: ignore[reportInvalidTypeArguments]
        case _:
            return Any


def _union(parts: list[Any]) -> Any:
    flat = [one for part in parts for one in _parts(part)]
    if Any in flat:
        return Any
    if any(_choices(part) for part in flat):  # an enum's values, which the host also takes as text
        flat = [part for part in flat if part is not str]
    return Union[tuple(flat)]  # noqa: UP007


def _parts(kind: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the only type."""
    return get_args(kind) if getattr(kind, "__origin__", None) is Union else (kind,)


def _choices(kind: Any) -> tuple[str, ...]:
    is_text = getattr(kind, "__origin__", None) is Literal and all(isinstance(choice, str) for choice in get_args(kind))
    return get_args(kind) if is_text else ()


def _describe(kind: Any) -> Iterator[str]:
    for part in _parts(kind):
        if getattr(part, "__origin__", None) is Literal:
            choices = get_args(part)
            listed = choices if len(choices) <= _LISTED else (*choices[:_LISTED], "…")
            yield f"one of {', '.join(map(str, listed))}"
        elif getattr(part, "__origin__", None) in (list, dict):
            yield f"{_NAMES[part.__origin__]} of {' or '.join(_describe(get_args(part)[-1]))}"
        else:
            yield _NAMES.get(part, "the name of a method")  # pyright: ignore[reportUnknownArgumentType]
