"""The turns of a conversation, in the forms of OpenAI, ShareGPT and others, to Messages."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import Message

Role = Literal["system", "user", "assistant"]

_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "chatbot": "assistant",
    "bard": "assistant",
    "bing": "assistant",
}
_TOOL_ROLES = frozenset(
    {
        "tool",
        "tools",
        "tool_call",
        "tool_calls",
        "tool_response",
        "tool_result",
        "function",
        "functions",
        "function_call",
        "function_response",
        "observation",
        "ipython",
    }
)
_ROLE_KEYS, _CONTENT_KEYS = ("role", "from"), ("content", "value", "text", "parts")
_TEXT_PARTS = frozenset({"text", "input_text", "output_text"})
_TOOL_KEYS = ("tool_calls", "function_call", "tools", "functions")
_MEDIA_KEYS = ("images", "image", "image_url", "audio", "audios", "video", "videos", "files", "attachments")
_THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking", "thoughts")
_LEARN_KEYS = ("weight", "train", "training", "trainable", "loss", "loss_mask", "train_detail", "training_detail")
_CONTEXT_KEYS = ("context", "documents", "document", "passage", "history", "rejected", "chosen")
_PLAIN_KEYS = frozenset(
    ("id", "name", "index", "idx", "turn", "turn_id", "turn_identifier", "message_id", "end_turn", "recipient", "model")
)
"""Keys of a turn that do not change what it says."""
_SURROGATE = re.compile("[\ud800-\udfff]")
_WRITTEN_TURNS = re.compile(r"\s*\[?\s*\{\s*['\"](?:role|from|content|value)['\"]\s*:")
_WRITTEN_ROLE = re.compile(r"['\"](?:role|from)['\"]\s*:\s*['\"](?:system|user|assistant|human|gpt)['\"]")
"""Marks of turns that a table holds as text."""
_NO_TOOLS = "Tool calls are not supported: remove such conversations."


@dataclass(frozen=True)
class TurnReader:
    """Reads turns; the fields are what a source says about them."""

    role: str | None = None
    """The key of a turn's role; None for `role` or `from`."""
    content: str | None = None
    """The key of a turn's text; None for `content`, `value`, `text` or `parts`."""
    ignored: frozenset[str] = field(default_factory=frozenset)
    """Keys that are read as if they were absent."""
    learns: bool = True
    """Whether the last assistant turn is learned, so that marks of what to learn are checked."""
    unread: dict[str, None] = field(default_factory=dict)
    """Collects the keys of turns that were not read and that may change what a turn says."""

    def is_turn(self, value: Any) -> bool:
        """Return whether a value looks like one turn."""
        return isinstance(value, Mapping) and self._key(value, self.role, _ROLE_KEYS) is not None

    def read(self, value: Any, where: str, *, answer: bool = False) -> list[Message]:
        """Return the turns of a list; the text of a list in JSON is read as the list.

        The last two turns may be without text (null), which reads as blank. If the last turn is an assistant's and
        `answer` is True, it is the completion.

        Raises:
            StayalignedError: if the value is something else, a turn's role is unknown, or a turn has a part that can't
                be represented: tool calls, images, thoughts beside the answer, or marks to learn other turns.
        """
        value = self.written(value, where)
        if not isinstance(value, list) or not value:
            hint = 'Write it as JSON: [{"role": "user", "content": "…"}, …].' if isinstance(value, str) else None
            raise StayalignedError(f"{where}: expected a list of turns, found {_type_of(value)}", hint=hint)
        last = len(value) - 1
        return [
            self._turn(turn, f"{where}, turn {index + 1}", final=answer and index == last, blank=index >= last - 1)
            for index, turn in enumerate(value)
        ]

    def written(self, value: Any, where: str) -> Any:
        """Return the turns that a cell holds as text (JSON, or Python's form) or by their keys; else the value itself.

        Raises:
            StayalignedError: if a text looks like turns but can't be parsed.
        """
        if isinstance(value, Mapping) and isinstance(roles := value.get(self._key(value, self.role, _ROLE_KEYS)), list):
            lists = {key: item for key, item in value.items() if isinstance(item, list) and len(item) == len(roles)}
            return [dict(zip(lists, turn, strict=True)) for turn in zip(*lists.values(), strict=True)]
        names = _ROLE_KEYS if self.role is None else (self.role,)
        if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
            return value
        if not any(f'"{name}"' in value or f"'{name}'" in value for name in names):
            return value
        found = parsed(value)
        turns = found if isinstance(found, list) else [found]
        if turns and all(self.is_turn(turn) and self._key(turn, self.content, _CONTENT_KEYS) for turn in turns):
            known = {
                str(turn[key]).strip().casefold() for turn in turns if (key := self._key(turn, self.role, _ROLE_KEYS))
            }
            return found if known <= {*_ROLES, *_TOOL_ROLES} else value
        if found is None and _WRITTEN_TURNS.match(value) and _WRITTEN_ROLE.search(value):
            raise StayalignedError(
                f"{where}: looks like turns, but is invalid JSON: {value.strip()[:60]!r}",
                hint='Write it as JSON: [{"role": "user", "content": "…"}, …].',
            )
        return value

    def _turn(self, turn: Any, where: str, *, final: bool, blank: bool) -> Message:
        role = self.role_of(turn)
        if role is None:
            named = str(turn[key]) if self.is_turn(turn) and (key := self._key(turn, self.role, _ROLE_KEYS)) else ""
            raise StayalignedError(
                f"{where}: expected a role (system, user or assistant) and content, found "
                + (f"the role {named!r}" if named else _listed(turn) if isinstance(turn, Mapping) else _type_of(turn)),
                hint=_NO_TOOLS
                if named.strip().casefold() in _TOOL_ROLES
                else 'A list of texts has no roles. Write turns: [{"role": "user", "content": "…"}, …].'
                if isinstance(turn, str)
                else 'A turn looks like {"role": "user", "content": "…"}. Name other keys: ?role=speaker&content=said',
            )
        self._refuse_unread(turn, where, role, final=final)
        key = self._key(turn, self.content, _CONTENT_KEYS)
        if key is None:
            raise StayalignedError(f"{where}: no `{self.content or 'content'}`, only {_listed(turn)}")
        # OpenAI's models write a refusal beside an empty content; it is the answer.
        content = turn.get("refusal") if turn[key] is None and "refusal" not in self.ignored else turn[key]
        if content is None and blank:
            return Message(role=role, content="")
        return Message(role=role, content=content_text(content, f"{where}: `{key}`"))

    def _refuse_unread(self, turn: Mapping[str, Any], where: str, role: Role, *, final: bool) -> None:
        final = final and role == "assistant"
        if len(turn) <= 2 or (final and not self.learns):  # a role and a text
            return

        def given(keys: Sequence[str]) -> list[str]:
            return [key for key in keys if key in turn and key not in self.ignored and not is_empty(turn[key])]

        way = "Or remove it, or read the rows as if it were absent: ?ignore={}"
        for key in given(_TOOL_KEYS):
            raise StayalignedError(f"{where}: `{key}` changes the meaning and is not read", hint=_NO_TOOLS)
        for key in given(_MEDIA_KEYS):
            raise StayalignedError(
                f"{where}: `{key}` changes the meaning and is not read", hint=f"Only text is read. {way.format(key)}"
            )
        for key in given(_CONTEXT_KEYS):
            raise StayalignedError(
                f"{where}: `{key}` changes the meaning and is not read",
                hint=f"Write it into the text. {way.format(key)}",
            )
        for key in given(_THOUGHT_KEYS) if final else ():
            raise StayalignedError(
                f"{where}: the thoughts in `{key}` are not read",
                hint=f"Write them into the answer with the model's own marks. {way.format(key)}",
            )
        for key in given(_LEARN_KEYS) if self.learns else ():
            learned = truth_of(turn[key])
            if learned is None or (final and not learned) or (role != "assistant" and learned):
                raise StayalignedError(
                    f"{where}: `{key}` is {turn[key]!r}, but the last assistant turn is learned and no other",
                    hint=f"Cut such conversations after the turn to learn. {way.format(key)}",
                )

        read = {
            *_ROLE_KEYS,
            *_CONTENT_KEYS,
            *_THOUGHT_KEYS,
            *_LEARN_KEYS,
            *_PLAIN_KEYS,
            self.role,
            self.content,
            "refusal",
        }
        self.unread.update(dict.fromkeys(key for key in given([*turn]) if key not in read))

    def role_of(self, turn: Any) -> Role | None:
        """Return the role of a turn; None if it has none that is known."""
        if not isinstance(turn, Mapping) or (key := self._key(turn, self.role, _ROLE_KEYS)) is None:
            return None
        return _ROLES.get(str(turn[key]).strip().casefold())

    @staticmethod
    def _key(turn: Mapping[str, Any], named: str | None, known: Sequence[str]) -> str | None:
        names = (named,) if named is not None else known
        # Tables have every key in every turn, most of them null.
        found = [name for name in names if turn.get(name) is not None]
        return next(iter(found), next((name for name in names if name in turn), None))


def read_transcript(text: str, where: str) -> list[Message]:
    r"""Return the turns of a transcript "\n\nHuman: …\n\nAssistant: …", as in Anthropic's preference data.

    Raises:
        StayalignedError: if the text has another form.
    """
    pieces = re.split(r"(?:^|\n\n)(Human|Assistant):", text.strip())
    if pieces[0].strip() or len(pieces) < 3:
        raise StayalignedError(
            f"{where}: holds the prompt and the answer in one text",
            hint='Write the prompt into a column `prompt`, or the conversation as turns: [{"role": "user", …}, …].',
        )
    roles: dict[str, Role] = {"Human": "user", "Assistant": "assistant"}
    return [
        Message(role=roles[name], content=checked_text(said.strip(), where))
        for name, said in zip(pieces[1::2], pieces[2::2], strict=True)
    ]


def read_asked(text: str, where: str) -> list[Message] | None:
    r"""Return the turns of a prompt "\n\nHuman: …\n\nAssistant:", which ends where an answer begins; else None."""
    if not text.lstrip().startswith("Human:") or not text.rstrip().endswith("\n\nAssistant:"):
        return None
    return read_transcript(text, where)[:-1]


def checked_text(value: Any, where: str) -> str:
    """Return a value that is valid text.

    Raises:
        StayalignedError: if it is of another type, or has half of a surrogate pair.
    """
    if not isinstance(value, str):
        raise StayalignedError(f"{where} is {kind_of(value)}, expected text")
    if _SURROGATE.search(value):
        raise StayalignedError(
            f"{where} contains half of a surrogate pair, which is invalid text", hint="Fix the JSON's \\u escapes."
        )
    return value


def parsed(text: str) -> Any:
    """Return the value of JSON, or of Python's literals as pandas writes lists into CSV; None for any other text."""
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return None


def kind_of(value: Any) -> str:
    """Return what a value is, for messages."""
    return "missing" if is_missing(value) else f"of type {type(value).__name__}"


def _type_of(value: Any) -> str:
    return "nothing" if is_missing(value) else f"a {type(value).__name__}"


def is_missing(value: Any) -> bool:
    """Return whether a value is null, or NaN, as pandas writes a missing cell."""
    return value is None or (isinstance(value, float) and value != value)


def is_empty(value: Any) -> bool:
    """Return whether a value says nothing: null, blank text, or a list or object of such values."""
    if isinstance(value, str):
        return value.strip() in ("", "[]", "{}", "null", "None")
    if isinstance(value, Mapping):
        return all(is_empty(item) for item in value.values())
    if isinstance(value, list | tuple):
        return all(is_empty(item) for item in value)
    return is_missing(value)


def truth_of(value: Any) -> bool | None:
    """Return the truth of a mark: true or 1, false or 0, or a list of equal marks; None for any other value."""
    if isinstance(value, list):
        read = {truth_of(item) for item in value}
        return read.pop() if len(read) == 1 else None
    text = str(value).strip().casefold()
    return True if text in ("true", "1", "1.0") else False if text in ("false", "0", "0.0") else None


def content_text(value: Any, where: str) -> str:
    """Return the text of a content: text, or a list of text parts, which are joined as chat templates join them."""
    if isinstance(value, Mapping):
        value = value["parts"] if isinstance(value.get("parts"), list) else [value]
    if not isinstance(value, list):
        return checked_text(value, where)
    texts: list[str] = []
    for number, part in enumerate(value, start=1):
        place = f"{where}, part {number}"
        if isinstance(part, str):
            texts.append(checked_text(part, place))
            continue
        if not isinstance(part, Mapping):
            raise StayalignedError(f"{place}: expected text, found {_type_of(part)}")
        kind = part.get("type", "text")
        if kind not in _TEXT_PARTS:
            raise StayalignedError(f"{place}: a part of the type {kind!r}", hint="Only text is read: remove such rows.")
        others = [key for key, item in part.items() if key not in ("type", "text") and not is_empty(item)]
        unread = [key for key in others if key in (*_TOOL_KEYS, *_MEDIA_KEYS, *_THOUGHT_KEYS)]
        if unread or part.get("text") is None:
            found = ", ".join(f"`{key}`" for key in unread) or "no text"
            raise StayalignedError(f"{place}: expected text, found {found}", hint="Only text is read.")
        texts.append(checked_text(part["text"], place))
    return "".join(texts)


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"`{key}`" for key in values) or "nothing"
