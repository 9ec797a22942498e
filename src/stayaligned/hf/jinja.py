"""Jinja that is written in front of a chat template: values, a fixed date, and the form of the content."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import Any

_DIRECTIVES = "aAbBcdefFgGHIjmMnpPrRsStTuUVwWxXyYzZhCklD"


def literal(value: Any) -> str:
    """Return a JSON value as a Jinja expression on one line."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        escaped = value.encode("unicode_escape").decode().replace('"', '\\"')
        return f'"{escaped}"'
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{literal(key)}: {literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(literal, value)) + "]"
    return f"({value})"


def fixed_clock(date: datetime.date) -> str:
    """Return a macro that replaces transformers' `strftime_now` by one of a fixed date, at midnight."""
    moment = datetime.datetime.combine(date, datetime.time(), tzinfo=datetime.UTC)
    directives = [f"%{flag}{letter}" for flag in ("-", "") for letter in _DIRECTIVES]
    known = {each: text for each in directives if (text := moment.strftime(each)) != each}
    filters = "".join(f" | replace({literal(each)}, {literal(text)})" for each, text in known.items())
    return f"{{% macro strftime_now(format) %}}{{{{ format{filters} }}}}{{% endmacro %}}"


def as_parts(roles: frozenset[str]) -> str:
    """Return Jinja that turns the text of some roles' turns into one part of the type `text`."""
    if not roles:
        return ""
    part = "[{'type': 'text', 'text': turn['content']}]"
    return (
        "{% set stayaligned = namespace(turns=[]) %}{% for turn in messages %}"
        f"{{% set as_parts = turn['role'] in {sorted(roles)} and turn['content'] is string %}}"
        f"{{% set stayaligned.turns = stayaligned.turns + [dict(turn, content={part}) if as_parts else turn] %}}"
        "{% endfor %}{% set messages = stayaligned.turns %}"
    )
