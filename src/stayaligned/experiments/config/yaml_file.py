"""Read a YAML file and `key=value` overrides into a plain mapping."""

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
        content = yaml.load(text, Loader=StrictLoader)  # noqa: S506 (a SafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # A ValueError is a number with too many digits; without Python's advice to change a limit of the interpreter.
        reason = "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise StayalignedError(f"{path}: not valid YAML: {reason.split('; use sys.')[0]}") from None
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
    """Parse a command-line value as YAML, except that 1e-4 is a number."""
    try:
        return yaml.load(text, Loader=StrictLoader)  # noqa: S506 (a SafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError):
        return text


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
    """A SafeLoader that refuses duplicate keys and reads 1e-4 as a number (YAML 1.1 reads a string)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Construct a mapping; a duplicate key is an error."""
        # A merge key (`<<: *defaults`) may repeat keys of the mapping, which then take precedence.
        named = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        keys = [self.construct_object(key, deep=True) for key in named]
        twice = next((key for index, key in enumerate(keys) if key in keys[:index]), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"key {twice!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep=deep)


# Dates are read as text: no setting takes a date, and JSON has none.
StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)
