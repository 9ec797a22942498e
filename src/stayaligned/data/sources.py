"""Read rows from files and hub data sets, and turn them into Examples.

A source is one string, written on one line of YAML:

    path/rows.jsonl                          JSON lines or a list, CSV, TSV, Parquet or Arrow, also compressed
    path/folder                              all such files in a folder, or what `datasets` saved there
    hf://owner/name?split=train&config=main  a data set of the hub, or of its local cache when offline
    ...?completion=response&where=is_safe:false

Options after the `?`:

- `prompt`, `completion`, `messages`, `chosen`, `rejected`, `system`, `instruction`, `input`, `context`, `history`,
  `id`, `category`: the source's name for a column, if it has another one;
- `role`, `content`: the source's names for the keys of a turn;
- `where=column:value`: only the rows with that value; several conditions must all hold;
- `ignore=column`: read the rows as if this column, or this key of a turn, were absent;
- `split`: of a hub data set (default "train"), or of a folder that has several;
- `files=*.csv`: only these files of a folder, or of a repository of the hub;
- for the hub: `config`, `revision`;
- for CSV: `columns=prompt,category` names the columns of files without a header.

`docs/reference/data.md` shows the formats of other tools, each with the line that names it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stayaligned.core.errors import StayalignedError, did_you_mean
from stayaligned.core.extras import require_packages
from stayaligned.core.files import refuse_unwritable_hub_cache
from stayaligned.core.records import Example, Origin
from stayaligned.core.text import is_blank
from stayaligned.data.files import Row as Row
from stayaligned.data.files import read_path, table_rows
from stayaligned.data.formats import (
    MEDIA_MARKS,
    METADATA,
    MISSING,
    TEMPLATE_MARKS,
    Columns,
    Conversation,
    read_conversation,
    refuse_unread,
    unknown_columns,
    verdict_of,
)
from stayaligned.data.options import Source, parse_source
from stayaligned.data.turns import TurnReader, is_missing, kind_of

_log = logging.getLogger(__name__)
PLACEHOLDER = "[replace this row]"
"""How a text begins that `stayaligned init` wrote for a person to replace; no run reads it."""
_LIKE_REQUESTS = re.compile(r"prompt|problem|question|request|query|inputs?\b|instruct|user|article|sentence", re.I)
_LIKE_ANSWERS = re.compile(r"answer|respon|output|completion|solution|target|summary|reply|assistant|label", re.I)
"""Names of columns for hints."""


# ---- rows of a source ----------------------------------------------------------------------------------------------


def read_rows(source: str) -> list[Row]:
    """Return the rows of a source that pass its filters, with its columns renamed as the source asks.

    Raises:
        StayalignedError: if the source is missing, malformed or empty, or no row passes the filters.
    """
    parsed = parse_source(source)
    rows = list(_read(parsed))
    if not rows:
        raise StayalignedError(
            f"{source}: no rows", hint="Give a file with at least one row, such as one JSON object per line."
        )
    known = sorted({name for row in rows for name in row.values})
    for column in (*parsed.columns.values(), *(column for column, _ in parsed.filters)):
        if column not in known:
            raise StayalignedError(f"{source}: no column {column!r}", hint=did_you_mean(column, known, "columns"))
    passed = [row for row in rows if all(_matches(row.values.get(c), wanted) for c, wanted in parsed.filters)]
    if not passed:
        column = parsed.filters[0][0]
        values = sorted({_as_text(row.values.get(column))[:40] for row in rows})[:8]
        raise StayalignedError(
            f"{source}: no row passes its filters", hint=f"Some values of {column!r}: {', '.join(values)}."
        )
    return [Row(where, _renamed(values, parsed)) for where, values in passed]


def _read(source: Source) -> Iterator[Row]:
    if not source.hub:
        return read_path(Path(source.place), source)
    return read_path(_downloaded(source), source) if "files" in source.reading else _hub_rows(source)


def _matches(value: Any, wanted: str) -> bool:
    text = _as_text(value)
    # CSV files have True and False, as Python writes them.
    return text == wanted or (wanted in ("true", "false", "null") and text.casefold() == wanted)


def _renamed(values: Mapping[str, Any], source: Source) -> dict[str, Any]:
    """Rename columns and leave out ignored ones; a column that already has one of the new names is dropped."""
    dropped = {*source.columns, *source.columns.values(), *source.ignored}
    others = {str(name): value for name, value in values.items() if name not in dropped}
    return {**others, **{ours: values[theirs] for ours, theirs in source.columns.items() if theirs in values}}


def _downloaded(source: Source) -> Path:
    """Download the files of a hub repository that match `files=`, or find them in the local cache."""
    from huggingface_hub import snapshot_download

    pattern, revision = source.reading["files"], source.reading.get("revision")
    try:
        return Path(snapshot_download(source.place, repo_type="dataset", revision=revision, allow_patterns=pattern))
    except (OSError, ValueError, RuntimeError) as error:
        raise _hub_error(source, error) from None


def _hub_rows(source: Source) -> Iterator[Row]:
    require_packages({source.text: ["datasets"]})
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    options = source.reading
    try:
        dataset = load_dataset(
            source.place,
            options.get("config"),
            split=options.get("split", "train"),
            revision=options.get("revision"),
        )
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise _hub_error(source, error) from None
    yield from table_rows(dataset.with_format("arrow")[:])


def _hub_error(source: Source, error: Exception) -> StayalignedError:
    from huggingface_hub.constants import HF_HUB_OFFLINE

    refuse_unwritable_hub_cache(error)
    offline = "HF_HUB_OFFLINE is set and the data set is not cached: unset it once, or give a local file."
    online = "Check the name, `config=` and `split=`, the network, and your access (`hf auth login`)."
    return StayalignedError(
        f"{source.text}: can't load the data set: {' '.join(str(error).split())[:300]}",
        hint=offline if HF_HUB_OFFLINE else online,
    )


# ---- rows to examples ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Found:
    row: Row
    conversation: Conversation


def read_examples(source: str, *, origin: Origin, prompts_only: bool = False) -> list[Example]:
    """Return the conversations of a source, in its order.

    The rows of a source have one format (`docs/reference/data.md`): `messages`, of which the last assistant turn is the
    completion; `prompt` with `completion`; Alpaca's `instruction`, `input` and `output`, also with `context` and
    `history`; or a preference, `chosen` and `rejected`, of which `chosen` is the completion. Rows may also have `id`,
    `category` and `system` (a turn before the first). A column that changes what a row means and that is not read is
    an error; other columns are ignored, and those that are not known to be metadata are logged. Rows with a blank or
    missing prompt or completion are skipped, and their number is logged. What a run logs so is a note of its result.

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
    options = parse_source(source)
    reader = TurnReader(
        role=options.turn_keys.get("role"),
        content=options.turn_keys.get("content"),
        ignored=frozenset(options.ignored),
        learns=not prompts_only,
    )
    settled = frozenset(column for column, _ in options.filters)
    found: list[_Found] = []
    unknown: dict[str, None] = {}
    verdicts: dict[tuple[str, bool], str] = {}
    for row in rows:
        where = f"{source}, {row.where}"
        columns = Columns(row.values, options.columns)
        conversation = read_conversation(columns, where, reader)
        if conversation is None:
            raise _unknown_format(source, row, reader)
        for name in ("id", "category"):
            columns.skip(name)
        refuse_unread(columns, where, settled=settled, origin=origin, learns=not prompts_only)
        unknown |= dict.fromkeys(unknown_columns(columns))
        for name, value in columns.unread().items():
            if name not in settled and (good := verdict_of(columns.about(name), value, origin)) is not None:
                verdicts.setdefault((name, good), row.where)
        found.append(_Found(row, conversation))
    _refuse_mixtures(source, found, {} if prompts_only else verdicts)
    if prompts_only:
        _log_mixtures(source, verdicts)
    _log_unread(source, found, [name for name in unknown if name not in settled], reader)
    full = _not_blank(source, found, prompts_only=prompts_only)
    _refuse_placeholders(source, full)
    _log_texts(source, full)
    return _identified(source, full, origin)


def _refuse_mixtures(source: str, found: Sequence[_Found], verdicts: Mapping[tuple[str, bool], str]) -> None:
    first = found[0]
    for name, good in verdicts:
        if (name, not good) in verdicts:
            raise StayalignedError(
                f"{source}: {verdicts[name, good]} and {verdicts[name, not good]} differ in `{name}`, and both would "
                "be read as harmful rows",
                hint=f"Name the rows to read, ?where={name}:VALUE, or read all: ?ignore={name}",
            )
    for at in (0, 1):
        by_column = {c: item for item in found if (c := item.conversation.columns[at]) is not None}
        if len(by_column) > 1:
            first = next(item for item in found if item.conversation.columns[at] is not None)
            known = first.conversation.columns[at]
            other = next(item for item in found if item.conversation.columns[at] not in (None, known))
            raise StayalignedError(
                f"{source}: mixed formats: {first.row.where} has `{known}`, {other.row.where} has "
                f"`{other.conversation.columns[at]}`",
                hint="Put rows of each format into a separate file.",
            )


def _refuse_placeholders(source: str, found: Sequence[_Found]) -> None:
    for item in found:
        texts = [item.conversation.completion or "", *(turn.content for turn in item.conversation.prompt)]
        if any(text.lstrip().startswith(PLACEHOLDER) for text in texts):
            raise StayalignedError(
                f"{source}, {item.row.where}: still the placeholder that `stayaligned init` wrote",
                hint="Replace each of its rows by a request of your own with the completion that you want.",
            )


def _log_mixtures(source: str, verdicts: Mapping[tuple[str, bool], str]) -> None:
    """Log columns by which some prompts, or their answers, are good ones and others bad ones."""
    for name, good in verdicts:
        if good and (name, False) in verdicts:
            _log.warning(
                "%s: all rows are asked alike, but %s and %s differ in `%s`; name the rows to read: ?where=%s:VALUE",
                *(source, verdicts[name, True], verdicts[name, False], name, name),
            )


def _log_unread(source: str, found: Sequence[_Found], unknown: Sequence[str], reader: TurnReader) -> None:
    for what, names in (("columns", unknown), ("keys of turns", reader.unread)):
        if names:
            _log.warning("%s: %s that are not read: %s", source, what, ", ".join(names))
    several = sum(any(turn.role == "assistant" for turn in item.conversation.prompt) for item in found)
    if several and reader.learns:
        _log.warning(
            "%s: %d of %d conversations have several assistant turns; the last one is learned, the others are context",
            source,
            several,
            len(found),
        )


def _log_texts(source: str, found: Sequence[_Found]) -> None:
    """Log texts that are probably not what they say: a missing value as text, a text that was rendered already."""
    for matches, what in (
        (MISSING.fullmatch, "say {}, which is read as text"),
        (MEDIA_MARKS.search, "contain {}, which stands for a part that is not read"),
        (TEMPLATE_MARKS.search, "contain {}, a mark of a chat template, which is written once more around them"),
    ):
        rows = [
            (item.row.where, mark[0].strip()[-40:])
            for item in found
            for text in ((item.conversation.completion or ""), *(turn.content for turn in item.conversation.prompt))
            if (mark := matches(text))
        ]
        if rows:
            count = len({where for where, _ in rows})
            where, mark = rows[0]
            _log.warning("%s: %d of %d rows %s (first: %s)", source, count, len(found), what.format(f"`{mark}`"), where)


def _not_blank(source: str, found: Sequence[_Found], *, prompts_only: bool) -> list[_Found]:
    if not prompts_only and all(item.conversation.completion is None for item in found):
        raise StayalignedError(
            f"{source}, {found[0].row.where}: no completion to learn, only "
            f"{', '.join(f'`{name}`' for name in found[0].row.values)}",
            hint="Add `completion` (or `output`, or a last assistant turn), or name its column: ?completion=COLUMN",
        )
    full = [
        item
        for item in found
        if not is_blank(item.conversation.prompt[-1].content)
        and (prompts_only or not is_blank(item.conversation.completion or ""))
    ]
    what = "prompt" if prompts_only else "prompt or completion"
    if not full:
        raise StayalignedError(f"{source}: all {len(found)} rows have a blank {what}", hint="Check the column names.")
    if len(full) < len(found):
        kept = {id(item) for item in full}
        first = next(item.row.where for item in found if id(item) not in kept)
        _log.warning(
            "%s: skipped %d of %d rows, whose %s is blank or missing (first: %s)",
            source,
            len(found) - len(full),
            len(found),
            what,
            first,
        )
    return full


def _unknown_format(source: str, row: Row, reader: TurnReader) -> StayalignedError:
    values = row.values
    names = {name.strip().casefold() for name in values}
    turns = [n for n, v in values.items() if isinstance(v, list) and v and reader.is_turn(v[0])]
    texts = sorted((n for n, v in values.items() if isinstance(v, str) and v.strip()), key=lambda n: -len(values[n]))
    if turns:
        hint = f"Name the column with the turns: ?messages={turns[0]}"
    elif {"segments"} <= names:
        hint = "Segments of text have no roles: write them as `messages`, or as `prompt` and `completion`."
    elif {"parent_id", "text"} <= names:
        hint = "Every row is one message: put each thread into one row, with `messages`."
    elif "behavior" in names:
        hint = "For HarmBench's file: {name: harmbench, source: FILE}. For another: ?prompt=" + next(
            name for name in values if name.strip().casefold() == "behavior"
        )
    elif "custom_id" in names:
        hint = "The output of a batch has no prompts: join it with its input into rows with `messages`."
    elif names == {"text"} or ("text" in names and len(texts) == 1):
        hint = (
            "A `text` holds prompt and completion in one, so what to learn is unknown: write `prompt` and "
            "`completion`, or `messages`. If it is a prompt: ?prompt=text"
        )
    else:
        texts = [n for n in texts if not _is_metadata(n)]
        likely = [name for name in values if name in texts[: 1 + reader.learns]]
        asked = min(filter(_LIKE_REQUESTS.search, texts), key=len, default=[*likely, "COLUMN"][0])
        others = [name for name in texts if name != asked and not _LIKE_REQUESTS.search(name)]
        said = next((name for name in others if _LIKE_ANSWERS.search(name)), [*others, "COLUMN"][0])
        hint = f"Rename the columns, or name them in the source: ?prompt={asked}"
        hint += f"&completion={said}" if reader.learns else ""
    if any(kind in source.casefold() for kind in (".csv", ".tsv", ".tab")):
        columns = ["prompt", "completion", *(f"column{n}" for n in range(3, len(values) + 1))][: len(values)]
        hint += f". If the first line is a row, name the columns: ?columns={','.join(columns)}"
    return StayalignedError(
        f"{source}, {row.where}: expected `messages`, `prompt` or `instruction`, found {Columns(values).listed()}",
        hint=hint,
    )


def _is_metadata(name: str) -> bool:
    plain = name.strip().casefold()
    return plain in METADATA or plain.endswith(("id", "type", "hash")) or "system" in plain


def _identified(source: str, found: Iterable[_Found], origin: Origin) -> list[Example]:
    """Create Examples with the ids of their rows, or else ids computed from content and occurrence number."""
    given: dict[str, str] = {}
    occurrences: Counter[str] = Counter()
    examples: list[Example] = []
    for row, conversation in ((item.row, item.conversation) for item in found):
        key = _id(row.values.get("id"), f"{source}, {row.where}")
        completion = conversation.completion or ""
        if key is None:
            turns = [(m.role, m.content) for m in conversation.prompt]
            content = json.dumps([turns, completion], ensure_ascii=False)
            digest = hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:16]
            occurrences[digest] += 1
            key = digest if occurrences[digest] == 1 else f"{digest}-{occurrences[digest]}"
        elif key in given:
            raise StayalignedError(
                f"{source}: {given[key]} and {row.where} have the same id, {key!r}",
                hint="Make the ids unique, or leave them out: ?ignore=id",
            )
        else:
            given[key] = row.where
        examples.append(
            Example(
                id=key,
                prompt=conversation.prompt,
                completion=completion,
                rejected=conversation.rejected,
                origin=origin,
                category=_category(row.values.get("category")),
            )
        )
    return examples


def _id(value: Any, where: str) -> str | None:
    """Return a row's id; a whole number may be a float, as tables with missing ids have it."""
    if is_missing(value) or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, str | int) and not isinstance(value, bool):
        return str(value)
    raise StayalignedError(
        f"{where}: `id` is {kind_of(value)}, expected text or a whole number", hint="Leave it out: ?ignore=id"
    )


def _category(value: Any) -> str:
    """Return a category as text; for a mapping of flags (BeaverTails), the names of the flags that are set."""
    if isinstance(value, Mapping):
        return ",".join(str(name) for name, is_set in value.items() if is_set)
    if isinstance(value, list):
        return ",".join(map(str, value))
    return "" if is_missing(value) else str(value)


def _as_text(value: Any) -> str:
    """Return a value as a source's filter writes it: `true` and `null` as in JSON."""
    return value if isinstance(value, str) else json.dumps(value, default=str)
