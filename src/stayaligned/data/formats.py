"""The formats of rows: which columns are the prompt and the completion, and which others change what a row means.

Column names are compared without case. The formats of TRL, axolotl, LLaMA-Factory, Unsloth and OpenAI are in
`docs/reference/data.md`, each with an example.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import Message, Origin
from stayaligned.core.text import is_blank
from stayaligned.data.turns import (
    TurnReader,
    checked_text,
    content_text,
    is_empty,
    is_missing,
    kind_of,
    parsed,
    read_asked,
    read_transcript,
    truth_of,
)


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


CONVERSATIONS = ("messages", "conversations", "conversation", "contents")
REQUESTS = ("prompt", "instruction", "question", "query", "goal", "input")
ANSWERS = ("completion", "output", "response", "answer", "generation")
CHOSEN = ("chosen", "chosen_response", "preferred_output")
REJECTED = ("rejected", "rejected_response", "non_preferred_output")
SYSTEMS = (
    *("system", "system_prompt", "system_message", "system_instruction", "systeminstruction", "systemprompt"),
    *("systemmessage", "sys_prompt"),
)
ROW_COLUMNS = frozenset({*CONVERSATIONS, *REQUESTS, *ANSWERS, *CHOSEN, *REJECTED})
"""Columns of which every row has at least one."""

_PAIRS = (("prompt", "completion"), ("instruction", "output"), ("question", "answer"), ("query", "response"))
"""Request and answer columns that belong together in a known format."""
_PARTS = ("input", "context")
"""Columns whose text follows an instruction or a question, in this order."""
_OPEN = frozenset({"instruction", "question", "query"})
"""Request columns that `_PARTS` follow; a prompt is complete by itself."""

_RENDERED = ("prompt", "instruction", "question", "query", "text", "content")
"""Columns beside the request that often repeat it, also together with the answer, as `text` of Alpaca does."""
_CHANGES_PROMPT = _names(
    "tools functions tool_choice images image image_url audio audios video videos documents document passage article"
    " paragraph background choices options history input context contextstring few_shot examples persona"
    " chat_template_kwargs"
) | {*SYSTEMS, *_RENDERED}
_CHANGES_ANSWER = _names(
    "tool_calls function_call reasoning reasoning_content thinking thoughts cot chain_of_thought thinking_trajectories"
    " reward rewards"
)
_LEARN_MARKS = _names("weight weights sample_weight train training trainable loss_mask assistant_masks completion_mask")
_GOOD = _names("label kto_tag accepted is_accepted preferred is_preferred correct is_correct")
"""Columns whose true value says that the completion is one to learn, and whose false value that it is not."""
_SAFE, _UNSAFE = (
    _names("is_safe safe safety"),
    _names("is_unsafe unsafe harmful is_harmful toxic is_toxic flagged is_flagged response_harm_label harm_label"),
)
"""Columns whose true value says that the completion is safe, or unsafe."""
_PREFERS = _names("better_response_id safer_response_id better_response winner preference overall_preference labels")
"""Columns that say which of two answers is the better one."""
_WORDS = {
    **dict.fromkeys(("safe", "unharmful", "desirable", "good", "accepted", "correct"), True),
    **dict.fromkeys(("unsafe", "harmful", "undesirable", "bad", "rejected", "incorrect"), False),
}
METADATA = _names(
    "id idx index uid uuid name source dataset subset split lang language url link date created_at timestamp license"
    " model model_name category categories topic domain task tags type difficulty prompt_id conversation_id message_id"
    " score score_chosen score_rejected rating quality num_turns turn token_count length hash text template"
    " custom_id method parallel_tool_calls __index_level_0__"
)

MISSING = re.compile(r"\s*(?:NA|N/A|#N/A|<NA>|NaN|nan|NULL|null|None|\\N)\s*")
"""What R, pandas, Excel and databases write into a text file for a missing value."""
TEMPLATE_MARKS = re.compile(
    r"<\|im_start\|>|<\|start_header_id\|>|\[INST\]|<start_of_turn>|<\|user\|>|<｜User｜>|<extra_id_1>"
    r"|\A\s*(?:### (?:Instruction|Human):|Below is an instruction that|A chat between a curious)"
    r"|(?:\n|\A(?:Human|USER|User): (?s:.*)\s)(?:Assistant|ASSISTANT|### Response|### Assistant):\s*\Z"
    r"|(?:</s>|<\|im_end\|>|<\|eot_id\|>|<\|endoftext\|>|<end_of_turn>|<eos>|<｜end▁of▁sentence｜>)\s*\Z"
)
"""Marks of a text that was rendered with a chat template; common ones only at its beginning or its end."""
MEDIA_MARKS = re.compile(
    r"^<(?:image|video|audio)>|<\|(?:image|image_pad|audio|video_pad)\|>|<image_placeholder>", re.MULTILINE
)
"""Placeholders of an image, a video or a sound that is not in the row."""


@dataclass(frozen=True)
class Conversation:
    """What a row says."""

    prompt: tuple[Message, ...]
    completion: str | None
    """The completion; None if the row has none."""
    rejected: str
    columns: tuple[str, str | None]
    """The column of the prompt and, if it is another one, of the completion."""


class Columns:
    """The columns of one row, by their names in lower case; counts which of them are read.

    Args:
        values: the row.
        explicit: the source's names of the columns that its options name, by our names.
    """

    def __init__(self, values: Mapping[str, Any], explicit: Mapping[str, str] | None = None) -> None:
        self.values = dict(values)
        self.explicit = explicit or {}
        self._read: set[str] = set()
        for name in ("input", "body", "params"):  # the request of an OpenAI preference, and of a batch
            inner = self.values.get(name)
            if isinstance(inner, Mapping) and inner.keys() & {"messages", "prompt", "input"}:
                del self.values[name]
                self.values |= {{"instructions": "system"}.get(key, str(key)): value for key, value in inner.items()}
        self._names: dict[str, str] = {}
        for name in self.values:
            plain = name.strip().casefold()
            if plain not in self._names or name == plain:
                self._names[plain] = name

    def given(self, names: Iterable[str]) -> list[str]:
        """Return those of `names` that have a value; if none has, those that are columns."""
        present = [name for name in names if name in self._names]
        return [name for name in present if self.peek(name) is not None] or present

    def peek(self, name: str) -> Any:
        """Return a value; None if it is missing."""
        value = self.values[self._names[name]] if name in self._names else None
        return None if is_missing(value) else value

    def take(self, name: str) -> Any:
        """Return a value, and count the column as read."""
        self.skip(name)
        return self.peek(name)

    def skip(self, name: str) -> None:
        """Count a column as read."""
        if name in self._names:
            self._read.add(self._names[name])

    def unread(self) -> dict[str, Any]:
        """Return the columns that were not read and are not empty."""
        return {name: value for name, value in self.values.items() if name not in self._read and not is_empty(value)}

    def about(self, name: str) -> str:
        """Return what a column says of the completion: `is_safe` for `is_response_1_safe`, if that is `response_1`."""
        plain = name.strip().casefold()
        for ours in ("completion", "chosen"):
            if ours in self.explicit:
                plain = plain.replace(self.explicit[ours].strip().casefold(), "")
        return re.sub("_+", "_", plain).strip("_")

    def listed(self) -> str:
        """Return the names of the columns, for messages."""
        return ", ".join(f"`{name}`" for name in self.values) or "nothing"


def read_conversation(row: Columns, where: str, reader: TurnReader) -> Conversation | None:
    """Return what a row says, and count the columns that say it as read; None if the row has no known format.

    Args:
        row: the row.
        where: the row's place, for messages.
        reader: reads the row's turns.

    Raises:
        StayalignedError: if the row's format is ambiguous, or the row can't be represented.
    """
    talks = [] if {"prompt", "instruction"} & row.explicit.keys() else row.given(CONVERSATIONS)
    requests = next(([name] for name in ("prompt", "instruction") if name in row.explicit), row.given(REQUESTS))
    # Tables of several formats have the columns of all, and dumps have conversations without turns.
    talks = [name for name in talks if not is_empty(row.peek(name))] or ([] if requests else talks)
    answers = ["completion"] if "completion" in row.explicit else row.given((*ANSWERS, *CHOSEN))
    prompt: list[Message] | None = None
    said: str | None = None
    if talks:
        column = talks[0]
        value = _with_roles(row.take(column), named="messages" in row.explicit)
        prompt = [] if is_empty(value) else reader.read(value, f"{where}: `{column}`", answer=True)
        if prompt and prompt[-1].role == "assistant":
            said = prompt.pop().content
            answers = [name for name in answers if not is_empty(row.peek(name))]
        for name in (*requests, *_RENDERED):
            if name not in requests or row.peek(name) in [turn.content for turn in prompt]:
                row.skip(name)
        answer = _one_answer(row, None, answers, where, reader)
    elif requests:
        column, answers = _pair(row, requests, answers, where)
        answer = _one_answer(row, column, answers, where, reader)
        prompt = [*_history(row, where, reader), *_request(row, column, where, reader)]
    elif chosen := [name for name in answers if name in CHOSEN]:
        column = answer = chosen[0]
    else:
        return None
    asked = row.peek(column)
    base, text = prompt, said
    if answer is not None:
        prompt, text = _reply(row.take(answer), f"{where}: `{answer}`", base, reader)
        if said is not None and text != said and reader.learns:
            raise _ambiguous(where, column, answer)
    rejected = ""
    for name in row.given(REJECTED)[:1]:
        other, found = _reply(row.take(name), f"{where}: `{name}`", base, reader)
        if found is not None and _plain(other) != _plain(prompt):
            raise StayalignedError(
                f"{where}: `{answer or column}` and `{name}` differ before their last turn",
                hint="Only the last turn can differ: shorten both conversations to the first turn that does.",
            )
        rejected = found or ""
    if isinstance(asked, str) and asked.lstrip().startswith("Human:"):  # the space behind "Assistant:"
        text, rejected = None if text is None else text.strip(), rejected.strip()
    turns = _with_system(row, prompt or [], where)
    _skip_repeated(row, turns)
    if all(turn.role == "system" or is_blank(turn.content) for turn in turns):
        turns = [*turns, Message(role="user", content="")]  # a row without a prompt, which is skipped and counted
    if turns[-1].role != "user":
        raise StayalignedError(
            f"{where}: expected a user's turn before the completion",
            hint="Cut the conversation after the answer to learn, or join the turns of one speaker.",
        )
    return Conversation(tuple(turns), text, rejected, (column, answer))


def _with_roles(value: Any, *, named: bool) -> Any:
    """Return turns for a list of texts, as LIMA writes conversations, but not for a column that the source names."""
    if named or not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        return value
    if any(text.lstrip().startswith("{") for text in value):  # turns as text
        return value
    return [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(value)]


def _pair(row: Columns, requests: list[str], answers: list[str], where: str) -> tuple[str, list[str]]:
    """Return the request column and the answer columns that can belong to it."""
    if len(requests) == 1 or "completion" in row.explicit:
        return requests[0], answers
    pairs = [(asked, said) for asked, said in _PAIRS if asked in requests and said in answers]
    if len(pairs) > 1:
        (first, _), (second, _) = pairs[:2]
        raise _ambiguous(where, first, second)
    return pairs[0][0] if pairs else requests[0], answers


def _one_answer(row: Columns, request: str | None, answers: list[str], where: str, reader: TurnReader) -> str | None:
    """Return the answer column; several are an error unless they agree, since one of them would be learned silently."""
    if not answers:
        return None
    own = next((said for asked, said in _PAIRS if asked == request and said in answers), answers[0])
    own = next((name for name in answers if name in CHOSEN), own) if request is None else own
    for name in answers:
        if name != own and row.peek(name) != row.peek(own) and reader.learns:
            raise _ambiguous(where, own, name)
        row.skip(name)
    return own


def _ambiguous(where: str, first: str, second: str) -> StayalignedError:
    return StayalignedError(
        f"{where}: both `{first}` and `{second}`, which differ",
        hint=f"Name the columns to read, ?prompt=COLUMN&completion=COLUMN, or leave one out: ?ignore={second}",
    )


def _request(row: Columns, column: str, where: str, reader: TurnReader) -> list[Message]:
    value = _one_text(reader.written(row.take(column), f"{where}: `{column}`"), f"{where}: `{column}`")
    if isinstance(value, list) or reader.is_turn(value):
        return reader.read(value if isinstance(value, list) else [value], f"{where}: `{column}`")
    text = "" if value is None else checked_text(value, f"{where}: `{column}`")
    if (turns := read_asked(text, f"{where}: `{column}`")) is not None:
        return turns
    if row.explicit.get(column, column).casefold() in _OPEN:
        parts = [text, *(checked_text(row.take(name) or "", f"{where}: `{name}`") for name in _PARTS)]
        text = "\n\n".join(part.strip() for part in parts if part.strip())
    return [Message(role="user", content=text)]


def _reply(
    value: Any, where: str, prompt: list[Message] | None, reader: TurnReader
) -> tuple[list[Message] | None, str | None]:
    """Return the prompt and the text of a completion: text, one turn, or a conversation that begins with the prompt.

    Beside a prompt that is only asked, a completion of another kind, such as a number or a list of answers, is absent.
    """
    if prompt is not None and not reader.learns:
        try:
            return _read_reply(value, where, prompt, reader)
        except StayalignedError:
            return prompt, None
    return _read_reply(value, where, prompt, reader)


def _read_reply(
    value: Any, where: str, prompt: list[Message] | None, reader: TurnReader
) -> tuple[list[Message] | None, str | None]:
    value = _one_text(reader.written(value, where), where)
    if value is None:
        return prompt, None
    if isinstance(value, str):
        if prompt is not None and not value.startswith("\n\nHuman:"):
            return prompt, checked_text(value, where)
        turns = read_transcript(checked_text(value, where), where)
    elif isinstance(value, list) or reader.is_turn(value):
        turns = reader.read(value if isinstance(value, list) else [value], where, answer=True)
    else:
        raise StayalignedError(
            f"{where} is {kind_of(value)}, expected text",
            hint="Write it as text, or name another column: ?completion=COLUMN",
        )
    *before, last = turns
    if last.role != "assistant":
        raise StayalignedError(f"{where}: expected text or one assistant turn")
    if prompt is None or not before:
        return before if prompt is None else prompt, last.content
    if _plain(before) == _plain(prompt):
        return prompt, last.content
    asked = [turn.content.strip() for turn in before if turn.role == "user"]
    if _plain(before[1:]) == _plain(prompt) or (len(prompt) == 1 and prompt[0].content.strip() in asked):
        return before, last.content
    raise StayalignedError(
        f"{where}: expected text or one assistant turn, found a conversation that does not begin with the prompt",
        hint="Remove the turns before the last, or the column of the prompt.",
    )


def _one_text(value: Any, where: str) -> Any:
    """Return the text of a list of one text; any other value unchanged."""
    if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
        return value
    if len(value) > 1:
        raise StayalignedError(
            f"{where}: {len(value)} texts, expected one",
            hint="Write each into a row of its own; of a preference, write the better text into `chosen` and the other "
            'into `rejected`; turns look like [{"role": "user", "content": "…"}, …].',
        )
    return value[0]


def _plain(turns: Sequence[Message] | None) -> list[tuple[str, str]]:
    return [(turn.role, turn.content.strip()) for turn in turns or ()]


def _history(row: Columns, where: str, reader: TurnReader) -> list[Message]:
    """Return the earlier turns in `history`: pairs of a request and its answer, or turns."""
    value = row.peek("history")
    if is_empty(value):
        return []
    row.skip("history")
    value = parsed(value) or value if isinstance(value, str) else value
    if isinstance(value, list) and all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in value):
        value = [turn for asked, said in value for turn in ({"role": "user", "content": asked}, _said(said))]
    return reader.read(value, f"{where}: `history`")


def _said(text: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def _with_system(row: Columns, turns: list[Message], where: str) -> list[Message]:
    column = next(iter(row.given(SYSTEMS)), "system")
    system = row.take(column)
    if is_empty(system):
        return turns
    for name in SYSTEMS:
        if row.peek(name) == system:
            row.skip(name)
    system = content_text(system, f"{where}: `{column}`")
    if turns and turns[0].role == "system":
        if turns[0].content.strip() == system.strip():
            return turns
        raise StayalignedError(f"{where}: both a `{column}` column and a system turn", hint="Remove one of the two.")
    return [Message(role="system", content=system), *turns]


def _skip_repeated(row: Columns, turns: Sequence[Message]) -> None:
    """Count columns as read that hold only text of the turns, or the last one together with the answer."""
    asked = next((turn.content.strip() for turn in reversed(turns) if turn.role == "user"), "")
    for name in _RENDERED:
        text = row.peek(name)
        if isinstance(text, str) and asked and (asked in text or any(text.strip() in turn.content for turn in turns)):
            row.skip(name)


# ---- columns that are not read -------------------------------------------------------------------------------------


def refuse_unread(row: Columns, where: str, *, settled: Collection[str], origin: Origin, learns: bool) -> None:
    """Raise if a column that was not read changes what the row means.

    Args:
        row: the row, after `read_conversation`.
        where: the row's place, for messages.
        settled: columns that the source filters by.
        origin: the role of the row; only harmful rows may have completions that are marked as bad.
        learns: whether the completion is learned; if not, only columns that belong to the prompt matter.

    Raises:
        StayalignedError: naming the column, and what to write.
    """
    for name, value in row.unread().items():
        plain = name.strip().casefold()
        if name in settled or (plain in _SWITCHED and _is_switch(value)):
            continue
        if plain in _CHANGES_PROMPT or (learns and plain in _CHANGES_ANSWER):
            way = "Remove it"
            if plain in (*_PARTS, *_RENDERED):
                way = f"To let it follow an instruction: ?instruction=COLUMN&input={name}. Or remove it"
            raise StayalignedError(
                f"{where}: `{name}` changes the meaning of the row and is not read",
                hint=f"{way}, or read the rows as if it were absent: ?ignore={name}",
            )
        if learns and plain in _LEARN_MARKS and truth_of(value) is not True:
            raise StayalignedError(
                f"{where}: `{name}` is {value!r}, but every row is learned alike",
                hint=f"Name the rows to read, ?where={name}:1, or read all: ?ignore={name}",
            )
        if learns and plain in _PREFERS and {"chosen", "rejected"} & row.explicit.keys():
            raise StayalignedError(
                f"{where}: `{name}` is {value!r}, but the same column is read as the better answer in every row",
                hint=f"Name the rows to read, ?where={name}:VALUE, or read all: ?ignore={name}",
            )
        if learns and verdict_of(row.about(name), value, origin) is False and origin != "harmful":
            raise StayalignedError(
                f"{where}: `{name}` is {value!r}, so its completion is one not to learn",
                hint=f"Name the rows to read, ?where={name}:{_other(value)}, or read all: ?ignore={name}",
            )


_SWITCHED = _names("reasoning thinking chat_template_kwargs")


def _is_switch(value: Any) -> bool:
    """Return whether a value only switches thoughts on or off, and says nothing itself."""
    if isinstance(value, Mapping):
        return all(isinstance(item, bool) or is_empty(item) for item in value.values())
    return isinstance(value, bool) or str(value).strip().casefold() in ("on", "off", "true", "false", "yes", "no")


def _other(value: Any) -> str:
    """Return how a source's filter writes the other value of a mark."""
    return {"true": "false", "false": "true", "1": "0", "0": "1"}.get(str(value).casefold(), "VALUE")


def verdict_of(name: str, value: Any, origin: Origin) -> bool | None:
    """Return whether a column says that the completion is good; None if it says nothing that matters for the origin.

    Whether completions are safe is a part of the meaning of alignment rows and of harmful rows, not of a task's rows.
    """
    plain = name.strip().casefold()
    relevant = _GOOD if origin == "task" else _GOOD | _SAFE | _UNSAFE
    if plain not in relevant:
        return None
    word, truth = _WORDS.get(str(value).strip().casefold()), truth_of(value)
    return word if word is not None or truth is None else truth != (plain in _UNSAFE)


def unknown_columns(row: Columns) -> list[str]:
    """Return the columns that were not read and that are not known to be metadata, or the index of a table."""
    unread = ((name, name.strip().casefold()) for name in row.unread())
    known = METADATA | _GOOD | _LEARN_MARKS
    return [name for name, plain in unread if plain not in known and not plain.startswith("unnamed: ")]
