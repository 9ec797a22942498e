"""Read completions that other tools wrote, with their prompts: the input of `stayaligned judge`.

A row has a prompt and a completion under the names that tools use: `prompt` and `response` of a script,
`messages` whose last turn is the assistant's, samples of lm-eval, HarmBench's completions, artifacts of JailbreakBench,
StrongREJECT's tables, the output of OpenAI's batches with its input. What can be read in two ways is an error.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from pydantic import ValidationError

from stayaligned.core.errors import StayalignedError, first_problem
from stayaligned.core.records import Completion, Message, PromptSet
from stayaligned.core.thoughts import join_thoughts, split_thoughts
from stayaligned.data.formats import TEMPLATE_MARKS
from stayaligned.data.options import parse_source
from stayaligned.data.sources import Row, read_rows
from stayaligned.data.turns import TurnReader, is_empty, is_missing, truth_of
from stayaligned.evaluation.endpoint.cost import Usage
from stayaligned.evaluation.endpoint.replies import (
    FilteredError,
    ReportedError,
    UnreadableBodyError,
    end_of,
    read_reply,
)

_log = logging.getLogger(__name__)

_TURNS = ("messages", "conversations", "conversation", "turns", "dialog", "dialogue", "chat")
_PROMPTS = (
    *("prompt", "forbidden_prompt", "question", "query", "request", "user_prompt", "test_case", "input_prompt"),
    *("origin_prompt", "instruction", "goal", "behavior", "input", "user"),
)
"""Names of the prompt, the preferred first: an attack's `goal` beside the `prompt` that was sent is metadata."""
_COMPLETIONS = (
    *("completion", "response", "output", "outputs", "generation", "generated_text", "generated", "text", "answer"),
    *("model_output", "model_response", "model_answer", "model_completion", "prediction", "resps", "responses"),
    *("completions", "generations", "reply", "assistant", "llm_response"),
)
_IDS = (
    *("custom_id", "id", "request_id", "prompt_id", "question_id", "sample_id", "doc_id", "behavior_id", "behaviorid"),
    *("uid", "uuid", "idx", "index"),
)
"""Names of a row's id, in lower case; a batch's output has an `id` of its own beside the `custom_id` of its input."""
_CATEGORIES = ("category", "harm_category", "semantic_category", "semanticcategory")
_SYSTEM = ("system", "system_prompt", "system_message")
_THOUGHTS = ("reasoning_content", "reasoning", "thinking", "thoughts")
_CHANGING = (
    *("context", "contexts", "retrieved_contexts", "documents", "history", "tools", "functions", "tool_calls"),
    *("images", "image", "image_url", "audio", "audios", "video", "videos", "files", "attachments"),
    *("prefill", "prefix", "chosen", "rejected", "jailbreak_prompt"),
)
"""Columns that change what a row means and that no judge would see."""
_LISTS = ("samples", "jailbreaks", "completions", "responses", "outputs", "results", "rows", "data")
"""Keys of a file with one object, whose rows are in a list below."""
_ERRORS = ("error", "error_message", "error_msg", "exception")
_TEXTS = ("content", "value", "text", "generated_text")
"""Keys of the text in an object with a completion."""


def read_foreign(source: str, prompt_set: PromptSet | None = None, prompts: str | None = None) -> list[Completion]:
    """Return the completions of a file that another tool wrote.

    Args:
        source: the file, or any other source of rows (`stayaligned.data.sources`).
        prompt_set: the prompt set of all rows that don't state theirs in `prompt_set`.
        prompts: source of the prompts, for rows that have only an id, such as the input of OpenAI's batches.

    Raises:
        StayalignedError: naming the row, if it has no prompt or no completion, can be read in two ways, has a column
            that changes its meaning and that no judge would see, or does not state its prompt set.
    """
    rows = [Row(row.where, _plain(row.values)) for row in _rows(source)]
    rows = _attempted(source, _of_one_filter(source, rows))
    options = parse_source(source)
    reader = TurnReader(options.turn_keys.get("role"), options.turn_keys.get("content"), learns=False)
    named = {name for name, _ in parse_qsl(source.partition("?")[2]) if name in ("prompt", "completion")}
    asked = None if prompts is None else _prompts_by_id(prompts)
    given = [_id(row.values, asked or ()) for row in rows]
    counts = Counter(given)
    seen: Counter[str] = Counter()
    completions: list[Completion] = []
    for row, key in zip(rows, given, strict=True):
        where = f"{source}, {row.where}"
        prompt, used = _prompt(row.values, where, asked, key, named, reader)
        text, finished = _completion(row.values, where, used, named, reader)
        _refuse_unread(row.values, where, prompt)
        if not key or counts[key] > 1:
            content = json.dumps([(turn.role, turn.content) for turn in prompt]).encode()
            key = key or hashlib.sha256(content).hexdigest()[:16]
            seen[key] += 1
            key = key if seen[key] == 1 and key not in counts else f"{key}-{seen[key]}"
        try:
            completion = Completion.model_validate(
                {
                    "id": key,
                    "prompt_set": _prompt_set(row.values, where, prompt_set),
                    "prompt": prompt,
                    "text": text,
                    "category": next((v for n in _CATEGORIES if isinstance(v := row.values.get(n), str)), ""),
                    "finished": finished,
                }
            )
        except ValidationError as error:
            raise StayalignedError(f"{where}: {first_problem(error)}", hint="Fix the row.") from None
        completions.append(completion)
    _warn(source, completions)
    return completions


def _warn(source: str, completions: Sequence[Completion]) -> None:
    rendered = sum(bool(TEMPLATE_MARKS.search(c.prompt[-1].content)) for c in completions)
    if rendered:
        _log.warning("%s: %d of %d prompts contain marks of a chat template", source, rendered, len(completions))
    echoed = sum(c.text.lstrip().startswith(c.prompt[-1].content.strip()) for c in completions)
    if 2 * echoed > len(completions):
        _log.warning(
            "%s: %d of %d completions begin with their prompt; if the tool returns both in one text, cut it off",
            *(source, echoed, len(completions)),
        )


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns of a row by their names in lower case; of two that differ in case, the one in lower case."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        plain = name.strip().casefold()
        if plain not in found or name == plain:
            found[plain] = value
    return found


def _of_one_filter(source: str, rows: Sequence[Row]) -> Sequence[Row]:
    """Return lm-eval's samples once: a task with several filters logs each completion once per filter."""
    filters: dict[str, Any] = {}
    kept: list[Row] = []
    for row in rows:
        if "resps" in row.values and "filter" in row.values:
            content = [row.values.get(name) for name in ("doc_id", "arguments", "resps")]
            if filters.setdefault(json.dumps(content, default=str), row.values["filter"]) != row.values["filter"]:
                continue
        kept.append(row)
    if len(kept) < len(rows):
        _log.warning(
            "%s: %d of %d rows repeat a completion under another filter of lm-eval and are skipped",
            *(source, len(rows) - len(kept), len(rows)),
        )
    return kept


def _attempted(source: str, rows: Sequence[Row]) -> Sequence[Row]:
    """Return the rows without those of JailbreakBench's artifacts for which the attack has no response."""
    without = [
        row
        for row in rows
        if ("jailbroken" in row.values or row.where.startswith("`jailbreaks`"))
        and is_missing(row.values.get("response"))
    ]
    if not without:
        return rows
    if len(without) == len(rows):
        raise StayalignedError(f"{source}: no row has a response", hint="The attack has nothing to judge.")
    _log.warning(
        "%s: %d of %d rows have no response and are skipped (first: %s); JailbreakBench counts them as not jailbroken, "
        "the rates here are those of the others",
        *(source, len(without), len(rows), without[0].where),
    )
    skipped = {id(row) for row in without}
    return [row for row in rows if id(row) not in skipped]


def _rows(source: str) -> Sequence[Row]:
    """Return the rows of a source; a file with one object holds them in a list, or by id as HarmBench does."""
    path = Path(source).expanduser()
    if path.suffix.lower() != ".json" or not path.is_file():
        return read_rows(source)
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return read_rows(source)  # JSON lines, or an error
    if not isinstance(content, dict):
        return read_rows(source)
    lists = {key: value for key, value in content.items() if _is_rows(value)}
    if lists and len(lists) == len(content):
        return [
            Row(f"{key!r}, item {number}", {"behavior_id": key, **value})
            for key, values in lists.items()
            for number, value in enumerate(values, start=1)
        ]
    if content and all(isinstance(value, dict) and _has_prompt(value) for value in content.values()):
        return [Row(repr(key), {"id": key, **value}) for key, value in content.items()]
    known = [key for key in _LISTS if key in lists]
    if len(known) != 1:
        raise StayalignedError(
            f"{source}: one object with the keys {', '.join(map(repr, [*content][:8]))}, none or several of which hold "
            "the rows",
            hint="Give a list of rows, or one JSON object per line.",
        )
    return [Row(f"`{known[0]}`, item {number}", value) for number, value in enumerate(lists[known[0]], start=1)]


def _has_prompt(values: Mapping[str, Any]) -> bool:
    return any(name in values for name in (*_TURNS, *_PROMPTS))


def _is_rows(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _prompts_by_id(source: str) -> dict[str, tuple[Message, ...]]:
    found: dict[str, tuple[Message, ...]] = {}
    for row in _rows(source):
        where = f"{source}, {row.where}"
        values = _plain(row.values)
        key = _id(values)
        values = values["body"] if isinstance(values.get("body"), dict) else values
        if not key or key in found:
            raise StayalignedError(f"{where}: {'a second row with' if key else 'no'} id {key}".rstrip(), hint=_ID_HINT)
        found[key], _ = _prompt(values, where, None, key, set(), TurnReader(learns=False))
    return found


_ID_HINT = f"The prompts are found by their ids: {', '.join(_IDS[:4])}, …"


def _id(values: Mapping[str, Any], known: Collection[str] = ()) -> str:
    """Return a row's id: the first that is known, or else the first."""
    given = [v for n in _IDS if isinstance(v := values.get(n), str | int | float) and not is_missing(v)]
    # A table with missing ids has the others as floats.
    found = [str(int(value) if isinstance(value, float) and value.is_integer() else value) for value in given]
    return next((key for key in found if key in known), next(iter(found), ""))


def _prompt(
    values: Mapping[str, Any],
    where: str,
    asked: Mapping[str, tuple[Message, ...]] | None,
    key: str,
    named: Set[str],
    reader: TurnReader,
) -> tuple[tuple[Message, ...], str]:
    """Return the turns before the completion, and the column that held them."""
    if asked is not None:
        if key not in asked:
            raise StayalignedError(f"{where}: no prompt has the id {key!r}", hint=_ID_HINT)
        return asked[key], ""
    name = next(iter(_present(values, ("prompt",) if "prompt" in named else (*_TURNS, *_PROMPTS))), None)
    value: Any = _lm_eval_prompt(values, where) if "arguments" in values and "resps" in values else None
    if value is None and name is None:
        batch = " The output of a batch has no prompts: give its input with --prompts." if "custom_id" in values else ""
        raise StayalignedError(
            f"{where}: no prompt; found {', '.join(f'`{n}`' for n in values) or 'nothing'}",
            hint=f"Name its column: FILE?prompt=COLUMN&completion=COLUMN.{batch}",
        )
    value = values[name] if value is None and name is not None else value
    turns, last = _turns(value, f"{where}: `{name or 'arguments'}`", reader)
    if last is not None and name not in _TURNS:
        raise StayalignedError(
            f"{where}: `{name or 'arguments'}` ends with the beginning of the completion, which no judge would see",
            hint="Write it into the completion.",
        )
    if name == "instruction" and isinstance(values.get("input"), str) and values["input"].strip():
        turns = [Message(role="user", content=f"{turns[0].content}\n\n{values['input']}")]
    system = next((values[n] for n in _SYSTEM if isinstance(values.get(n), str) and values[n].strip()), None)
    if system is not None and turns and turns[0].role != "system":
        turns = [Message(role="system", content=system), *turns]
    if not turns or turns[-1].role != "user":
        raise StayalignedError(f"{where}: expected a user's turn before the completion", hint="Fix the row.")
    if not turns[-1].content.strip():
        raise StayalignedError(f"{where}: the prompt is blank", hint="Fix the row, or remove it.")
    return tuple(turns), name or ""


def _present(values: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Return the columns of these names; those without a value, which a table has in every row, only if all lack it."""
    found = [name for name in names if name in values]
    return [name for name in found if not is_missing(values[name])] or found


def _lm_eval_prompt(values: Mapping[str, Any], where: str) -> object:
    """Return the prompt of a sample that lm-eval logged."""
    arguments = values["arguments"]
    first = next(iter(arguments.values()), None) if isinstance(arguments, dict) else arguments and arguments[0]
    parts = [*first.values()] if isinstance(first, dict) else first
    if not isinstance(parts, list | tuple) or len(parts) < 2 or not isinstance(parts[1], dict) or len(arguments) != 1:
        raise StayalignedError(
            f"{where}: not one text that the model generated, but likelihoods of choices, or several",
            hint="Judges need tasks of lm-eval that generate (`output_type: generate_until`).",
        )
    return parts[0]


def _turns(value: object, where: str, reader: TurnReader) -> tuple[list[Message], dict[str, Any] | None]:
    """Return the turns of a prompt, and apart from them a last turn that is the assistant's, as it is written."""
    if isinstance(value, str):
        written: Any = reader.written(value, where)
        if isinstance(written, str):
            return [Message(role="user", content=written)], None
        value = written if isinstance(written, list) else [written]
    if not isinstance(value, list) or not value:
        raise StayalignedError(
            f"{where}: expected a text or a list of turns, found {'nothing' if not value else type(value).__name__}",
            hint=_MISSING if not value else 'Turns look like [{"role": "user", "content": "…"}].',
        )
    *before, last = value
    if reader.role_of(last) != "assistant":
        return reader.read(value, where), None
    return reader.read(before, where) if before else [], last


def _completion(
    values: Mapping[str, Any], where: str, prompt_column: str, named: Set[str], reader: TurnReader
) -> tuple[str, bool]:
    """Return the text of the completion, and whether it ended by itself."""
    for name in _ERRORS:
        if not is_empty(values.get(name)) and values[name] is not False:
            raise StayalignedError(f"{where}: an error, no completion: {str(values[name])[:200]}", hint=_MISSING)
    taken = {prompt_column, *(("input",) if prompt_column == "instruction" else ())}
    found = {f"`{n}`": values[n] for n in _present(values, [n for n in _COMPLETIONS if n not in taken])}
    if "completion" in named:
        found = {"`completion`": values["completion"]}
    elif prompt_column in _TURNS:
        _, last = _turns(values[prompt_column], f"{where}: `{prompt_column}`", reader)
        if last is not None:
            found = {name: value for name, value in found.items() if not is_missing(value)}
            found[f"the last turn of `{prompt_column}`"] = last
    if not found:
        raise StayalignedError(
            f"{where}: no completion; the columns are {', '.join(f'`{n}`' for n in values)}",
            hint="Name its column: FILE?completion=COLUMN.",
        )
    texts = {
        name: _text(reader.written(value, f"{where}: {name}"), f"{where}: {name}") for name, value in found.items()
    }
    if len({split_thoughts(text).answer for text, _ in texts.values()}) > 1:
        raise StayalignedError(
            f"{where}: several possible completions: {', '.join(found)} differ",
            hint="Name its column, FILE?completion=COLUMN, or remove the others.",
        )
    text = max((text for text, _ in texts.values()), key=len)  # one may be without the thoughts
    thoughts = next((v for n in _THOUGHTS if isinstance(v := values.get(n), str) and v.strip()), "")
    cut = _is_cut(values, where) or truth_of(values.get("finished")) is False or truth_of(values.get("truncated"))
    return join_thoughts(thoughts, text), all(finished for _, finished in texts.values()) and not cut


_MISSING = "Remove such rows, or generate them again: rates over the others alone may be those of easier prompts."


def _is_cut(values: Mapping[str, Any], where: str) -> bool:
    """Return whether a completion was cut, as its row or its object says."""
    reason, meaning = end_of(values)
    if meaning in ("filtered", "broken"):
        raise StayalignedError(f"{where}: not what the model wrote, since it ended with {reason!r}", hint=_MISSING)
    return meaning == "cut"


def _text(value: object, where: str) -> tuple[str, bool]:
    """Return text and end of a completion: a text, a list of one, or an object of vLLM, Inspect or a server."""
    while isinstance(value, list):
        if len(value) != 1:
            raise StayalignedError(f"{where}: {len(value)} completions", hint="Write each into a row of its own.")
        value = value[0]
    if isinstance(value, str):
        return value, True
    if isinstance(value, dict) and isinstance(value.get("body"), dict):  # a batch's response
        if value.get("status_code", 200) != 200:
            raise StayalignedError(f"{where}: status {value['status_code']}: no completion", hint=_MISSING)
        value = value["body"]
    if isinstance(value, dict) and "choices" not in value:  # a turn, or another object with a text
        content = next((value[key] for key in _TEXTS if value.get(key) is not None), None)
        cut = _is_cut(value, where)
        if content is not None or value.get("refusal"):
            value = {
                "choices": [{"message": {**value, "content": content}, "finish_reason": "length" if cut else None}]
            }
    if isinstance(value, dict) and "choices" in value:
        try:
            reply = read_reply(json.dumps(value, default=str).encode(), Usage(0, 0))
        except (FilteredError, ReportedError, UnreadableBodyError) as error:
            raise StayalignedError(
                f"{where}: not a model's completion: {str(error) or 'filtered by the server'}", hint=_MISSING
            ) from None
        if reply.withheld or reply.calls_tools:
            raise StayalignedError(f"{where}: {reply.withheld or 'calls a tool'}", hint=_MISSING)
        return join_thoughts(reply.thoughts, reply.text), reply.finished is not False
    kind = "missing" if is_empty(value) else f"of type {type(value).__name__}"
    raise StayalignedError(f"{where} is {kind}, expected a text", hint=_MISSING)


def _refuse_unread(values: Mapping[str, Any], where: str, prompt: Sequence[Message]) -> None:
    asked = "\n".join(turn.content for turn in prompt)
    for name in _changing(values):
        if not (isinstance(values[name], str) and values[name].strip() in asked):
            raise StayalignedError(
                f"{where}: the column `{name}` changes what the row means, and no judge would see it",
                hint="Put it into the prompt (`messages`), or remove the column.",
            )


def _changing(values: Mapping[str, Any]) -> Iterator[str]:
    for name in (*_CHANGING, *(("input",) if "instruction" not in values and "prompt" in values else ())):
        if not is_empty(values.get(name)):
            yield name


def _prompt_set(values: Mapping[str, Any], where: str, prompt_set: PromptSet | None) -> str:
    stated = values.get("prompt_set")
    if stated is None and prompt_set is None:
        raise StayalignedError(
            f"{where}: does not state whether its prompt should be refused",
            hint="Give --prompt-set harmful or --prompt-set benign, or a column `prompt_set` with these words.",
        )
    if stated is not None and prompt_set not in (None, stated):
        raise StayalignedError(f"{where}: its prompt set is {stated!r}, not {prompt_set!r}", hint="Drop --prompt-set.")
    return stated if stated is not None else str(prompt_set)
