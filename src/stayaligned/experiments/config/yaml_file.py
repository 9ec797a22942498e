"""Read a YAML 1.2 file and `key=value` overrides into a plain mapping."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from stayaligned.core.errors import StayalignedError
from stayaligned.core.files import read_text


def load_yaml(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Load the mapping in a YAML file, and apply dotted `key=value` overrides (`defenses.0.rho=2`).

    Raises:
        StayalignedError: if the file is missing or not a YAML mapping, or an override is invalid.
    """
    text = read_text(path, hint="Give the path of a YAML file.")
    try:
        content = _parse(text.removeprefix("\ufeff"))
    except yaml.YAMLError as error:
        hint = "Indent with spaces: YAML allows no tabs there." if r"'\t'" in str(error) else None
        raise StayalignedError(f"{path}: not valid YAML: {' '.join(str(error).split())}", hint=hint) from None
    try:
        json.dumps(content)
    except (ValueError, TypeError, RecursionError) as error:
        raise StayalignedError(f"{path}: not a plain configuration: {error}", hint="Use text and numbers.") from None
    if not isinstance(content, dict):
        raise StayalignedError(
            f"{path}: expected settings (`key: value`), found {_KINDS.get(type(content), 'a single value')}"
        )
    apply_overrides(content, overrides)
    return content


_KINDS: dict[type, str] = {type(None): "an empty file", list: "a list", str: "text", bool: "true or false"}


def dump_yaml(value: Any) -> str:
    """Return the YAML of a plain value, which `load_yaml` reads back unchanged."""
    return yaml.dump(value, Dumper=_CoreDumper, sort_keys=False, allow_unicode=True)


def apply_overrides(content: dict[str, Any], overrides: Sequence[str]) -> None:
    """Set each dotted `key=value` in a mapping.

    Raises:
        StayalignedError: if an override has another form, or its key leads to a value that can't hold it.
    """
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise StayalignedError(f"{override!r} is not key=value", hint="For example: training.learning_rate=1e-4")
        set_dotted(content, key, parse_value(value))


def parse_value(text: str) -> Any:
    """Parse a command-line value as YAML without comments: `#` is part of the text."""
    try:
        value = _parse(text)
    except yaml.YAMLError:
        return text
    is_plain_text = isinstance(value, str | None) and "#" in text and text.strip()[:1] not in {"'", '"'}
    return text if is_plain_text else value


def _parse(text: str) -> Any:
    """Parse YAML.

    Raises:
        yaml.YAMLError: if it is invalid.
    """
    try:
        return yaml.load(text, Loader=StrictLoader)  # noqa: S506 (a SafeLoader)
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None


def set_dotted(content: dict[str, Any], key: str, value: Any) -> None:
    """Set `content["a"][0]["b"]` for the key `a.0.b`, creating missing mappings.

    Raises:
        StayalignedError: if a part of the key leads into something other than a mapping or a list.
    """
    *parents, last = key.split(".")
    place: Any = content
    for part in parents:
        if isinstance(place, list) and part.isdigit() and int(part) < len(place):
            if isinstance(place[int(part)], str):
                place[int(part)] = {"name": place[int(part)]}
            place = place[int(part)]
        elif isinstance(place, dict):
            if isinstance(place.get(part), str):
                place[part] = {"name": place[part]}
            elif place.get(part) is None:
                place[part] = {}
            place = place[part]
        else:
            raise StayalignedError(
                f"{key}: {part!r} is not in the configuration", hint="Lists are indexed from 0: defenses.0.rho=2"
            )
    if isinstance(place, list) and last.isdigit() and int(last) <= len(place):
        place[int(last) : int(last) + 1] = [value]
    elif isinstance(place, dict):
        place[last] = value
    else:
        raise StayalignedError(
            f"{key}: {last!r} is not in the configuration", hint="Lists are indexed from 0: defenses.0.rho=2"
        )


class StrictLoader(yaml.SafeLoader):
    """A SafeLoader of YAML 1.2's core schema that refuses duplicate keys.

    PyYAML reads YAML 1.1, in which `no` is false, 1e-4 is text, 012 is ten, 10:20 is a number and 2026-11-28 a date.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Construct a mapping; a duplicate key is an error."""
        # A merge key (`<<: *defaults`) may repeat keys of the mapping, which then take precedence.
        named = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        keys = [self.construct_object(key, deep=True) for key in named]
        twice = next((key for index, key in enumerate(keys) if key in keys[:index]), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"key {twice!r} is given twice", node.start_mark)
        if other := [key for key in keys if not isinstance(key, str)]:
            raise yaml.constructor.ConstructorError(
                None, None, f"key {other[0]!r} is not text; put it in quotes", node.start_mark
            )
        return super().construct_mapping(node, deep=deep)

    def construct_core_int(self, node: yaml.ScalarNode) -> int:
        """Construct an integer: decimal, 0o17 or 0xff."""
        text = str(self.construct_scalar(node))
        base = {"0o": 8, "0x": 16}.get(text[:2], 10)
        try:
            return int(text, base)
        except ValueError as error:  # `!!int text`, or more digits than Python converts
            reason = str(error).split("; use sys.")[0]  # Python's advice is for programmers
            raise yaml.constructor.ConstructorError(None, None, reason, node.start_mark) from None

    def construct_core_float(self, node: yaml.ScalarNode) -> float:
        """Construct a number with a fraction or an exponent, .inf or .nan."""
        text = str(self.construct_scalar(node)).lower()
        try:
            return float(text.replace(".inf", "inf").replace(".nan", "nan"))
        except ValueError as error:
            raise yaml.constructor.ConstructorError(None, None, str(error), node.start_mark) from None


_CORE_SCHEMA = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    "merge": (r"<<", ["<"]),  # of YAML 1.1: `<<: *defaults`
}
"""Plain scalars that are not text (YAML 1.2.2, section 10.3.2), and the characters with which they begin."""

StrictLoader.yaml_implicit_resolvers = {}
# Not binary, timestamp, set and the like: JSON has none of them, and no setting takes one.
StrictLoader.yaml_constructors = {
    tag: construct
    for tag, construct in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag.rpartition(":")[2] in {"null", "bool", "str", "seq", "map"}
}
for _name, (_pattern, _first) in _CORE_SCHEMA.items():
    StrictLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(rf"^(?:{_pattern})$"), _first)
StrictLoader.add_constructor("tag:yaml.org,2002:int", StrictLoader.construct_core_int)
StrictLoader.add_constructor("tag:yaml.org,2002:float", StrictLoader.construct_core_float)


class _CoreDumper(yaml.SafeDumper):
    """A SafeDumper that quotes text which either version of YAML reads as something else."""


for _name, (_pattern, _first) in _CORE_SCHEMA.items():
    _CoreDumper.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(rf"^(?:{_pattern})$"), _first)
