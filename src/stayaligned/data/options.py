"""The text of a source, `place?option=value&…`, as `stayaligned.data.sources` describes it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote

from stayaligned.core.errors import StayalignedError, did_you_mean

HUB = "hf://"
"""The beginning of a source on the hub."""
COLUMNS = (
    "id",
    "prompt",
    "completion",
    "messages",
    "rejected",
    "chosen",
    "system",
    "instruction",
    "input",
    "context",
    "history",
    "category",
)
"""Columns that a source can have under another name."""
_TURN_KEYS = ("role", "content")
_READING = ("split", "files")
_HUB_READING = ("config", "revision")


@dataclass(frozen=True)
class Source:
    """A parsed source."""

    text: str
    """The whole source as the user wrote it, for messages."""
    place: str
    """The path or the hub id."""
    hub: bool
    """Whether the place is a hub id."""
    columns: dict[str, str] = field(default_factory=dict)
    """The source's names of columns, by ours."""
    turn_keys: dict[str, str] = field(default_factory=dict)
    """The source's names of a turn's `role` and `content`."""
    filters: tuple[tuple[str, str], ...] = ()
    """The column and the wanted value of each `where=`."""
    ignored: tuple[str, ...] = ()
    """Columns, or keys of a turn, that are read as if they were absent."""
    reading: dict[str, str] = field(default_factory=dict)
    """Which rows to read: `split`, `files`, and on the hub `config` and `revision`."""
    csv_columns: tuple[str, ...] | None = None
    """The column names of CSV files without a header."""


def parse_source(source: str) -> Source:
    """Split a source into its place and its options; an existing path is never split.

    Raises:
        StayalignedError: if an option is unknown, without a value, or given twice.
    """
    hub = source.startswith(HUB)
    if not hub and "?" in source and exists(source):
        return Source(source, source, hub=False)
    place, _, query = source.removeprefix(HUB).partition("?")
    reading_names = [*_READING, *(_HUB_READING if hub else ())]
    allowed = [*COLUMNS, *_TURN_KEYS, "where", "ignore", "columns", *reading_names]
    columns: dict[str, str] = {}
    turn_keys: dict[str, str] = {}
    reading: dict[str, str] = {}
    filters: list[tuple[str, str]] = []
    ignored: list[str] = []
    csv_columns: tuple[str, ...] | None = None
    for name, value in _options(query):
        if name not in allowed:
            raise StayalignedError(f"{source}: no source option {name!r}", hint=did_you_mean(name, allowed, "options"))
        if not value:
            raise StayalignedError(f"{source}: the option {name!r} has no value", hint=f"Write {name}=VALUE.")
        if name == "where":
            column, colon, wanted = value.partition(":")
            if not colon:
                raise StayalignedError(f"{source}: where={value} is not a filter", hint="Write where=column:value.")
            filters.append((column, wanted))
        elif name == "ignore":
            ignored += value.split(",")
        elif name in columns or name in turn_keys or name in reading or (name == "columns" and csv_columns):
            raise StayalignedError(f"{source}: the option {name!r} is given twice", hint="Give it once.")
        elif name == "columns":
            csv_columns = tuple(value.split(","))
        else:
            (columns if name in COLUMNS else turn_keys if name in _TURN_KEYS else reading)[name] = value
    return Source(source, place, hub, columns, turn_keys, tuple(filters), tuple(ignored), reading, csv_columns)


def _options(query: str) -> list[tuple[str, str]]:
    """Return the names and values of a query; a plus sign is a plus sign, as in a value `c++`."""
    parts = [part.partition("=") for part in query.split("&") if part]
    return [(unquote(name), unquote(value)) for name, _, value in parts]


def exists(source: str) -> bool:
    """Return whether a whole source is an existing path."""
    try:
        return Path(source).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # too long, a NUL character, or no home directory
        return False
