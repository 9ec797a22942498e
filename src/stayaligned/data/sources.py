"""Read rows from JSONL, JSON and CSV files and hub data sets, and turn them into Examples.

A source is one string, written on one line of YAML:

    path/rows.jsonl                          JSON lines; or .json with one list; or .csv
    path/folder                              all such files in a folder, in order of their names
    hf://owner/name?split=train&config=main  a data set of the hub, or of its local cache when offline
    ...?completion=response&where=is_safe:false

Options after the `?`:

- `prompt`, `completion`, `id`, `category`: the source's name for a column, if it has another one;
- `where=column:value`: only the rows with that value; several conditions must all hold;
- for the hub: `split` (default "train"), `config`, `revision`; or `files=*.csv`, to read the files of a repository;
- for CSV: `columns=prompt,category` names the columns of files without a header.

This is the only module that imports `datasets`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

from stayaligned.core.errors import StayalignedError, did_you_mean
from stayaligned.core.records import Example, Message, Origin
from stayaligned.data.csv import parse_csv

_HUB = "hf://"
_COLUMNS = ("id", "prompt", "completion", "category")
_HUB_OPTIONS = ("split", "config", "revision", "files")
_FILE_TYPES = (".jsonl", ".json", ".csv")
_SURROGATE = re.compile("[\ud800-\udfff]")
_log = logging.getLogger(__name__)


class Row(NamedTuple):
    """One row of a source, unchanged."""

    where: str
    """The row's place, for messages: "line 12", "item 12" of a list, "row 12" of a hub data set; counted from 1."""
    values: dict[str, Any]


@dataclass(frozen=True)
class _Source:
    text: str
    """The whole source as the user wrote it, for messages."""
    place: str
    """The path or the hub id."""
    hub: bool
    columns: dict[str, str] = field(default_factory=dict)
    filters: tuple[tuple[str, str], ...] = ()
    hub_options: dict[str, str] = field(default_factory=dict)
    csv_columns: tuple[str, ...] | None = None
    """The column names of CSV files without a header."""


# ---- rows of a source ----------------------------------------------------------------------------------------------


def read_rows(source: str) -> list[Row]:
    """Return the rows of a source that pass its filters, with its columns renamed as the source asks.

    Raises:
        StayalignedError: if the source is missing, malformed or empty, or no row passes the filters.
    """
    parsed = _parse_source(source)
    by_files = not parsed.hub or "files" in parsed.hub_options
    rows = list(_file_rows(parsed) if by_files else _hub_rows(parsed))
    if not rows:
        raise StayalignedError(f"{source}: no rows", hint="Give a file with one JSON object per line.")
    known = sorted({name for row in rows for name in row.values})
    for column in (*parsed.columns.values(), *(column for column, _ in parsed.filters)):
        if column not in known:
            raise StayalignedError(f"{source}: no column {column!r}", hint=did_you_mean(column, known, "columns"))
    rows = [row for row in rows if all(_as_text(row.values.get(c)) == wanted for c, wanted in parsed.filters)]
    if not rows:
        raise StayalignedError(f"{source}: no row passes its filters", hint="Check the values after `where=`.")
    return [Row(where, _renamed(values, parsed.columns)) for where, values in rows]


def _renamed(values: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """Rename columns; a column that already has one of the new names is dropped."""
    others = {name: value for name, value in values.items() if name not in columns and name not in columns.values()}
    return {**others, **{ours: values[theirs] for ours, theirs in columns.items() if theirs in values}}


def _parse_source(source: str) -> _Source:
    hub = source.startswith(_HUB)
    if not hub and Path(source).expanduser().exists():
        return _Source(source, source, hub=False)
    place, _, query = source.removeprefix(_HUB).partition("?")
    allowed = [*_COLUMNS, "where", "columns", *(_HUB_OPTIONS if hub else ())]
    columns: dict[str, str] = {}
    filters: list[tuple[str, str]] = []
    hub_options: dict[str, str] = {}
    csv_columns: tuple[str, ...] | None = None
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name not in allowed:
            raise StayalignedError(f"{source}: no source option {name!r}", hint=did_you_mean(name, allowed, "options"))
        if name == "where":
            column, colon, wanted = value.partition(":")
            if not colon:
                raise StayalignedError(f"{source}: where={value} is not a filter", hint="Write where=column:value.")
            filters.append((column, wanted))
        elif name == "columns":
            csv_columns = tuple(value.split(","))
        else:
            (columns if name in _COLUMNS else hub_options)[name] = value
    return _Source(source, place, hub, columns, tuple(filters), hub_options, csv_columns)


def _file_rows(source: _Source) -> Iterator[Row]:
    path = _downloaded(source) if source.hub else Path(source.place).expanduser()
    if path.is_dir():
        files = sorted((p for p in path.iterdir() if p.suffix in _FILE_TYPES and p.is_file()), key=_natural_order)
        if not files:
            raise StayalignedError(
                f"{source.text}: no .jsonl, .json or .csv file in this folder",
                hint="Give a file or a folder of such files.",
            )
        for file in files:
            for row in _rows_of_file(file, source.csv_columns):
                yield Row(f"{file.name}, {row.where}", row.values)
    elif path.is_file():
        yield from _rows_of_file(path, source.csv_columns)
    else:
        hint = "Give a .jsonl, .json or .csv file, a folder of them, or hf://owner/name for a hub data set."
        raise StayalignedError(f"{source.text}: no such file", hint=hint)


def _natural_order(path: Path) -> tuple[list[tuple[int, str]], str]:
    """Sort category_2 before category_10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"([0-9]+)", path.name)], path.name


def _rows_of_file(path: Path, csv_columns: Sequence[str] | None) -> Iterator[Row]:
    try:
        if path.suffix == ".csv":
            with path.open(encoding="utf-8-sig", newline="") as stream:
                yield from (Row(f"line {n}", dict(cells)) for n, cells in parse_csv(stream, str(path), csv_columns))
            return
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise StayalignedError(f"{path}: not UTF-8 text (byte {error.start})", hint="Convert it to UTF-8.") from None
    except OSError as error:
        raise StayalignedError(f"{path}: {error.strerror}") from None
    if path.suffix == ".json":
        content = _parse_json(text, str(path))
        if not isinstance(content, list):
            raise StayalignedError(
                f"{path}: expected a list of rows", hint="A file with one object per line is named .jsonl."
            )
        items = (("item", number, value) for number, value in enumerate(content, start=1))
    else:
        # Not splitlines(), which also splits at U+2028 and similar characters; these are ordinary inside a JSON string.
        lines = enumerate(text.split("\n"), start=1)
        items = (("line", n, _parse_json(line, f"{path}, line {n}")) for n, line in lines if line.strip())
    for kind, number, value in items:
        if not isinstance(value, dict):
            raise StayalignedError(
                f"{path}, {kind} {number}: expected an object, found {type(value).__name__}",
                hint='A row looks like {"prompt": "…", "completion": "…"}.',
            )
        yield Row(f"{kind} {number}", value)


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise StayalignedError(
            f"{where}: invalid JSON: {error}", hint="Write one JSON object per line (.jsonl)."
        ) from None


def _downloaded(source: _Source) -> Path:
    """Download the files of a hub repository that match `files=`, or find them in the local cache."""
    from huggingface_hub import snapshot_download

    pattern, revision = source.hub_options["files"], source.hub_options.get("revision")
    try:
        return Path(snapshot_download(source.place, repo_type="dataset", revision=revision, allow_patterns=pattern))
    except (OSError, ValueError, RuntimeError) as error:
        raise _hub_error(source, error) from None


def _hub_rows(source: _Source) -> Iterator[Row]:
    from datasets import load_dataset

    options = source.hub_options
    try:
        dataset = load_dataset(
            source.place,
            options.get("config"),
            split=options.get("split", "train"),
            revision=options.get("revision"),
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise _hub_error(source, error) from None
    for number, values in enumerate(dataset, start=1):
        yield Row(f"row {number}", dict(values))


def _hub_error(source: _Source, error: Exception) -> StayalignedError:
    from huggingface_hub.constants import HF_HUB_OFFLINE

    offline = "HF_HUB_OFFLINE is set and the data set is not cached: unset it once, or give a local file."
    online = "Check the name, `config=` and `split=`, the network, and your access (`hf auth login`)."
    return StayalignedError(
        f"{source.text}: can't load the data set: {' '.join(str(error).split())[:300]}",
        hint=offline if HF_HUB_OFFLINE else online,
    )


# ---- rows to examples ----------------------------------------------------------------------------------------------


def read_examples(source: str, *, origin: Origin, prompts_only: bool = False) -> list[Example]:
    """Return the conversations of a source, in its order.

    A source has rows of one format: `messages` (the last assistant turn is the completion); `prompt` with `completion`
    (text or messages each); or Alpaca's `instruction`, `input`, `output` (instruction and input become one user turn).
    A `prompt` with `chosen` and `rejected` is a preference: `chosen` is the completion. Rows may also have `id`,
    `category` and `system` (a turn before the first). Other columns are ignored. Rows with a blank prompt or completion
    are skipped, and their number is logged.

    Args:
        source: the source, as the module describes.
        origin: the role of the rows in an experiment.
        prompts_only: whether completions may be missing or blank, as in a prompt set.

    Raises:
        StayalignedError: naming the line, if the source can't be read or has another format.
    """
    return build_examples(source, read_rows(source), origin=origin, prompts_only=prompts_only)


def build_examples(source: str, rows: Sequence[Row], *, origin: Origin, prompts_only: bool = False) -> list[Example]:
    """Turn rows into Examples as `read_examples` does; `source` is their name in messages."""
    shape, first = _shape_of(rows[0].values), rows[0].where
    conversations: list[tuple[Row, tuple[Message, ...], str]] = []
    for row in rows:
        found = _shape_of(row.values)
        where = f"{source}, {row.where}"
        if found is None:
            raise StayalignedError(
                f"{where}: expected `messages`, `prompt` or `instruction`, found {_listed(row.values)}",
                hint="Rename the columns, or name them in the source: rows.jsonl?prompt=question&completion=completion",
            )
        if found != shape:
            raise StayalignedError(
                f"{source}: mixed formats: {first} has `{shape}`, {row.where} has `{found}`",
                hint="Put rows of each format into a separate file.",
            )
        prompt, completion = _conversation(row.values, where, shape, prompts_only=prompts_only)
        if prompt[-1].content.strip() and (prompts_only or completion.strip()):
            conversations.append((row, prompt, completion))
    if not conversations:
        what = "prompt" if prompts_only else "prompt or completion"
        raise StayalignedError(f"{source}: all {len(rows)} rows have a blank {what}", hint="Check the column names.")
    if len(conversations) < len(rows):
        _log.warning("%s: skipped %d of %d rows, which are blank", source, len(rows) - len(conversations), len(rows))
    return _identified(source, conversations, origin)


def _identified(
    source: str, conversations: Iterable[tuple[Row, tuple[Message, ...], str]], origin: Origin
) -> list[Example]:
    """Create Examples with the ids of their rows, or else ids computed from content and occurrence number."""
    given: dict[str, str] = {}
    occurrences: Counter[str] = Counter()
    examples: list[Example] = []
    for row, prompt, completion in conversations:
        key = row.values.get("id")
        if key is not None and not isinstance(key, str | int):
            raise StayalignedError(f"{source}, {row.where}: `id` is {_kind(key)}, expected text or a whole number")
        if key is None:
            content = json.dumps([[(m.role, m.content) for m in prompt], completion], ensure_ascii=False)
            digest = hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:16]
            occurrences[digest] += 1
            key = digest if occurrences[digest] == 1 else f"{digest}-{occurrences[digest]}"
        elif str(key) in given:
            raise StayalignedError(
                f"{source}: {given[str(key)]} and {row.where} have the same id, {str(key)!r}",
                hint="Make the ids unique, or remove the column.",
            )
        else:
            given[str(key)] = row.where
        examples.append(
            Example(
                id=str(key),
                prompt=prompt,
                completion=completion,
                rejected=_completion_text(row.values.get("rejected"), f"{source}, {row.where}: `rejected`") or "",
                origin=origin,
                category=_category(row.values.get("category")),
            )
        )
    return examples


def _shape_of(values: Mapping[str, Any]) -> str | None:
    return next((key for key in ("messages", "prompt", "instruction") if key in values), None)


def _conversation(
    values: Mapping[str, Any], where: str, shape: str | None, *, prompts_only: bool
) -> tuple[tuple[Message, ...], str]:
    completion: str | None
    if shape == "messages":
        turns = _messages(values["messages"], f"{where}: `messages`")
        has_completion = turns[-1].role == "assistant"
        turns, completion = (turns[:-1], turns[-1].content) if has_completion else (turns, None)
    elif shape == "prompt":
        turns = _turns_or_text(values["prompt"], f"{where}: `prompt`")
        column = "completion" if "completion" in values or "chosen" not in values else "chosen"
        completion = _completion_text(values.get(column), f"{where}: `{column}`")
    else:
        parts = [_text(values.get(key, "") or "", f"{where}: `{key}`") for key in ("instruction", "input")]
        turns = [Message(role="user", content="\n\n".join(part.strip() for part in parts if part.strip()))]
        completion = _completion_text(values.get("output"), f"{where}: `output`")
    if completion is None and not prompts_only:
        raise StayalignedError(
            f"{where}: no completion to learn, only {_listed(values)}",
            hint="Add `completion` (or `output`, or a last assistant turn), or name its column: ?completion=response",
        )
    system = values.get("system")
    if system:
        if turns and turns[0].role == "system":
            raise StayalignedError(f"{where}: both a `system` column and a system turn", hint="Remove one of the two.")
        turns = [Message(role="system", content=_text(system, f"{where}: `system`")), *turns]
    if not turns or turns[-1].role != "user":
        raise StayalignedError(f"{where}: expected a user's turn before the completion")
    return tuple(turns), completion or ""


def _turns_or_text(value: Any, where: str) -> list[Message]:
    return _messages(value, where) if isinstance(value, list) else [Message(role="user", content=_text(value, where))]


def _completion_text(value: Any, where: str) -> str | None:
    if not isinstance(value, list):
        return None if value is None else _text(value, where)
    turns = _messages(value, where)
    if len(turns) != 1 or turns[0].role != "assistant":
        raise StayalignedError(f"{where}: expected text or one assistant turn")
    return turns[0].content


def _messages(value: Any, where: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise StayalignedError(f"{where}: expected a list of turns, found {_kind(value)}")
    turns: list[Message] = []
    for number, turn in enumerate(value, start=1):
        role = turn.get("role") if isinstance(turn, dict) else None
        if role not in ("system", "user", "assistant"):
            raise StayalignedError(
                f"{where}, turn {number}: expected a role (system, user or assistant) and content",
                hint='A turn looks like {"role": "user", "content": "…"}. Tool calls are not supported.',
            )
        turns.append(Message(role=role, content=_text(turn.get("content"), f"{where}, turn {number}: `content`")))
    return turns


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise StayalignedError(f"{where} is {_kind(value)}, expected text")
    if _SURROGATE.search(value):
        raise StayalignedError(
            f"{where} contains half of a surrogate pair, which is invalid text", hint="Fix the JSON's \\u escapes."
        )
    return value


def _category(value: Any) -> str:
    """Return a category as text; for a mapping of flags (BeaverTails), the names of the flags that are set."""
    if isinstance(value, Mapping):
        return ",".join(str(name) for name, is_set in value.items() if is_set)
    return "" if value is None else str(value)


def _as_text(value: Any) -> str:
    """Return a value as a source's filter writes it: `true` and `null` as in JSON."""
    return value if isinstance(value, str) else json.dumps(value)


def _kind(value: Any) -> str:
    return "missing" if value is None else f"of type {type(value).__name__}"


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"`{key}`" for key in values) or "nothing"
