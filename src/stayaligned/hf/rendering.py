"""Conversations as text: chat templates with their arguments and date, checked for what they show the model.

The arguments, the date and the form of a turn's content are written in front of the template, so that everything that
renders with it (TRL, lm-eval) renders the same text.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from stayaligned.core.errors import StayalignedError, nearest
from stayaligned.core.files import read_text
from stayaligned.core.records import Message
from stayaligned.core.settings import ChatTemplate
from stayaligned.core.thoughts import is_mark, opened_thoughts, split_thoughts
from stayaligned.hf.jinja import as_parts, fixed_clock, literal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BOUND = "{# stayaligned: arguments, date and form of the content #}"
"""Begins the line that is written in front of a template."""
_MARKERS = {"system": "system4f1c", "user": "request8a3e", "assistant": "turn7b2d"}
_ANSWER = "answer9d5c"
"""Content of probed turns, each with a number behind it."""
_WITH_PARTS: tuple[frozenset[str], ...] = (
    frozenset(),
    frozenset({"system", "user", "assistant"}),
    frozenset({"user", "assistant"}),
    frozenset({"user"}),
)
"""Roles whose content a template may want as a list of parts, in the order in which they are tried."""
_GIVEN = {"messages", "add_generation_prompt", "raise_exception", "strftime_now", "tools", "documents"}
_CLOCK = re.compile(r"\bstrftime_now\b")
_SWITCH = re.compile(r"/(?:no_?think|think)\b")
"""Words with which a system or user turn switches thoughts on or off; some templates take them out."""
_READS_THOUGHTS = re.compile(r"\b(?:reasoning_content|thinking|reasoning)\b")
"""Keys of a turn under which transformers passes an answer's thoughts to a template."""
_MARK_OF_TURN = re.compile(r"<[^<>\s]{1,60}>|\[[^\[\]\s]{1,20}\]|(?m:^#{2,} *\w+:?|^\w{2,20}:)")
"""Marks of a turn's beginning or end: tokens in brackets, headings, and names with a colon."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RenderedAnswer:
    """A conversation with its answer, as a template renders it."""

    asked: str
    """The prompt with the generation prompt."""
    told: str
    """The whole conversation with the answer."""
    header: str
    """What the template writes between the generation prompt and any answer: empty thoughts, as a rule."""
    tail: str
    """What the template writes behind any answer to such a conversation: its end, as a rule."""


def bind_template(tokenizer: PreTrainedTokenizerBase, settings: ChatTemplate | None = None) -> str:
    """Return a tokenizer's chat template with its arguments, its date and the form of the content written in front.

    A template that reads none of them is returned as it is. One that is bound already is returned as it is, unless
    other settings are given.

    Raises:
        StayalignedError: if there is no template or no default one, if it is not valid Jinja, lacks an argument, or
            does not show the model the request and the answer.
    """
    text = _own_template(tokenizer)
    if text.startswith(_BOUND):
        if settings is None:
            return text
        text = unbound(text)
    settings = settings or ChatTemplate()
    found = _BINDINGS.setdefault(tokenizer, {})
    key = (text, settings.model_dump_json())
    if key not in found:
        found[key] = _bind(tokenizer, text, settings)
    return found[key]


def use_settings(tokenizer: PreTrainedTokenizerBase, settings: ChatTemplate) -> None:
    """Let a tokenizer render with these settings, wherever it is used.

    Raises:
        StayalignedError: as `bind_template`, or if the template's file can't be read.
    """
    if settings.file is not None:
        path = Path(settings.file).expanduser()
        tokenizer.chat_template = read_text(path, hint="Give the path of a Jinja file.")
    _replace(tokenizer, bind_template(tokenizer, settings))


def unbound(text: str) -> str:
    """Return a template without what `bind_template` has written in front of it."""
    return text.partition("\n")[2] if text.startswith(_BOUND) else text


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write a tokenizer with its own chat template, as whoever loads it expects it."""
    bound = tokenizer.chat_template
    try:
        _replace(tokenizer, unbound(_own_template(tokenizer)))
        tokenizer.save_pretrained(str(directory))
    finally:
        tokenizer.chat_template = bound


def render_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Message]) -> str:
    """Return a prompt as text: the chat template with the generation prompt.

    Raises:
        StayalignedError: if there is no usable template, or it leaves out a turn or a part of one.
    """
    template = bind_template(tokenizer)
    _probe(tokenizer, template, tuple(message.role for message in prompt))
    turns = [{"role": message.role, "content": message.content} for message in prompt]
    text = _apply(tokenizer, template, turns, add_generation_prompt=True)
    _require_shown(tokenizer, prompt, text)
    for message in prompt:
        _warn_if_mark_inside(tokenizer, template, message.content)
    return text


def render_answer(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Message], answer: str) -> RenderedAnswer:
    """Return a prompt with its answer as text; see `render_prompt`."""
    template = bind_template(tokenizer)
    header, tail = _probe(tokenizer, template, tuple(message.role for message in prompt))
    told = _with_answer(tokenizer, template, prompt, answer)
    _require_shown(tokenizer, prompt, told)
    _warn_if_mark_inside(tokenizer, template, answer)
    return RenderedAnswer(render_prompt(tokenizer, prompt), told, header, tail if told.endswith(tail) else "")


def _with_answer(tokenizer: PreTrainedTokenizerBase, template: str, prompt: Sequence[Message], answer: str) -> str:
    """Return the conversation with an answer, whose thoughts are rendered as the family writes them, if it has any."""
    turns = [{"role": message.role, "content": message.content} for message in prompt]
    own = split_thoughts(answer)
    if own.thoughts and own.answer is not None and _READS_THOUGHTS.search(template):
        apart = {"role": "assistant", "content": own.answer, "reasoning_content": own.thoughts}
        told = _apply(tokenizer, template, [*turns, apart], add_generation_prompt=False)
        if is_shown(own.thoughts, told) and is_shown(own.answer, told):
            return told
    whole = {"role": "assistant", "content": answer}
    return _apply(tokenizer, template, [*turns, whole], add_generation_prompt=False)


def render_whole(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    """Return a finished conversation as text, for a judge that reads it; the date is fixed.

    A guard's template need not be one to answer with: what it writes before an answer and behind it does not matter.

    Raises:
        StayalignedError: if there is no template, it shows neither form of the request and the completion, or it
            rejects the conversation.
    """
    text = _own_template(tokenizer)
    found = _BINDINGS.setdefault(tokenizer, {})
    if (text, "") not in found:
        found[text, ""] = _bind_whole(tokenizer, text)
    turns = [{"role": message.role, "content": message.content} for message in messages]
    return _apply(tokenizer, found[text, ""], turns, add_generation_prompt=False)


def around_answers(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Return what the chat template writes between the prompt and the answer to a user's turn, and behind it."""
    template = bind_template(tokenizer)
    try:
        return _probe(tokenizer, template, ("user",))
    except StayalignedError:  # it wants a system turn
        return _probe(tokenizer, template, ("system", "user"))


def is_shown(content: str, text: str) -> bool:
    """Return whether a rendered text contains a content, but for space, switches of thoughts, and JSON's escapes."""
    if content.strip() in text:
        return True
    as_json = (json.dumps(content.strip(), ensure_ascii=ascii)[1:-1] for ascii in (False, True))
    return _squeezed(content) in _squeezed(text) or any(each in text for each in as_json)


def warn_if_space_differs(tokenizer: PreTrainedTokenizerBase, content: str, text: str) -> None:
    """Log once for a tokenizer that its template changes the space inside a turn, such as the lines of code."""
    found = _BINDINGS.setdefault(tokenizer, {})
    plain = _SWITCH.sub("", content).strip()
    if plain in _SWITCH.sub("", text) or content.strip() in text or ("", "space") in found or not plain:
        return
    if _squeezed(content) in _squeezed(text):
        found["", "space"] = ""
        _log.warning(
            "the chat template of %s changes the space or the line breaks inside a turn (first: %r)",
            *(tokenizer.name_or_path or "the tokenizer", content.strip()[:60]),
        )


# ---- settings in front of a template ---------------------------------------------------------------------------------

_BINDINGS: WeakKeyDictionary[Any, dict[tuple[str, str], str]] = WeakKeyDictionary()
_PROBED: WeakKeyDictionary[Any, dict[tuple[str, tuple[str, ...]], tuple[str, str]]] = WeakKeyDictionary()


def _own_template(tokenizer: PreTrainedTokenizerBase) -> str:
    templates: Any = tokenizer.chat_template
    name = tokenizer.name_or_path or "the model"
    if not templates:
        raise StayalignedError(
            f"the tokenizer of {name} has no chat template",
            hint="Use the instruction-tuned model's tokenizer, or set `tokenizer.chat_template`.",
        )
    if isinstance(templates, Mapping):
        if not templates.get("default"):
            raise StayalignedError(
                f"the tokenizer of {name} has the chat templates {', '.join(sorted(templates))}, and none is the "
                "default",
                hint="Name one of them `default`, or set `chat_template.file` to a file with one template.",
            )
        return str(templates["default"])
    return str(templates)


def _replace(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    templates: Any = tokenizer.chat_template
    tokenizer.chat_template = {**templates, "default": text} if isinstance(templates, Mapping) else text


def _bind(tokenizer: PreTrainedTokenizerBase, text: str, settings: ChatTemplate) -> str:
    _require_arguments(tokenizer, text, settings)
    prefix = "".join(f"{{% set {name} = {literal(value)} %}}" for name, value in settings.arguments.items())
    if _CLOCK.search(text):
        prefix += fixed_clock(settings.date)
    problems: list[StayalignedError] = []
    for roles in (("user",), ("system", "user")):
        for with_parts in _WITH_PARTS:
            template = _in_front(prefix + as_parts(with_parts), text)
            try:
                _probe(tokenizer, template, roles)
                if "system" not in roles and not with_parts:
                    return template
                return _best_with_system(tokenizer, template, prefix, text, with_parts)
            except StayalignedError as error:
                problems.append(error)
    raise problems[0]


def _bind_whole(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    prefix = fixed_clock(ChatTemplate().date) if _CLOCK.search(text) else ""
    turns = [{"role": "user", "content": _MARKERS["user"]}, {"role": "assistant", "content": _ANSWER}]
    for with_parts in _WITH_PARTS:
        template = _in_front(prefix + as_parts(with_parts), text)
        with suppress(StayalignedError):
            told = _apply(tokenizer, template, turns, add_generation_prompt=False)
            if _MARKERS["user"] in told and _ANSWER in told and "{'type'" not in told:
                return template
    raise StayalignedError(
        f"{tokenizer.name_or_path}: the chat template does not show the guard the request and the completion",
        hint="The template must render a conversation of a user turn and an assistant turn.",
    )


def _in_front(line: str, text: str) -> str:
    return f"{_BOUND}{line}\n{text}" if line else text


def _require_arguments(tokenizer: PreTrainedTokenizerBase, text: str, settings: ChatTemplate) -> None:
    read = read_variables(tokenizer, text)
    for name in settings.arguments:
        if name not in read:
            own = sorted(read - _GIVEN - set(tokenizer.special_tokens_map))
            raise StayalignedError(
                f"chat_template.arguments.{name}: the chat template never reads it; it reads "
                f"{', '.join(own) or 'no argument'}",
                hint=nearest(name, own) or "Remove it.",
            )
    if settings.date != ChatTemplate().date and not _CLOCK.search(text):
        hint = "Remove it."
        if named := sorted(name for name in read if "date" in name):
            hint = f"The template reads the date from an argument: set chat_template.arguments.{named[0]}."
        raise StayalignedError("chat_template.date: the chat template does not write today's date", hint=hint)


def read_variables(tokenizer: PreTrainedTokenizerBase, text: str) -> set[str]:
    """Return the variables that a template reads and does not set itself.

    Raises:
        StayalignedError: if it is not valid Jinja.
    """
    from jinja2 import Environment, TemplateSyntaxError, meta

    # transformers' own block around what the assistant writes
    text = re.sub(r"\{%([-+]?)\s*(?:end)?generation\s*([-+]?)%\}", r"{#\1 \2#}", text)
    try:
        # Nothing is rendered here.
        tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(text)  # noqa: S701
    except TemplateSyntaxError as error:
        raise StayalignedError(
            f"the chat template of {tokenizer.name_or_path or 'the tokenizer'} is not valid Jinja: line "
            f"{error.lineno}: {error.message}",
            hint="Fix the template.",
        ) from None
    return meta.find_undeclared_variables(tree)


def _best_with_system(
    tokenizer: PreTrainedTokenizerBase, template: str, prefix: str, text: str, chosen: frozenset[str]
) -> str:
    """Return the binding that also shows a system turn, if one does; else the given one."""
    others = [roles for roles in _WITH_PARTS if roles and roles - {"system"} == chosen - {"system"}]
    for candidate in (template, *(_in_front(prefix + as_parts(roles), text) for roles in others)):
        try:
            _probe(tokenizer, candidate, ("system", "user"))
        except StayalignedError:
            continue
        return candidate
    return template


# ---- what a template shows -------------------------------------------------------------------------------------------


def _probe(tokenizer: PreTrainedTokenizerBase, template: str, roles: tuple[str, ...]) -> tuple[str, str]:
    """Check that a template shows every turn of a conversation, and the answer behind them.

    Returns what stands between the generation prompt and the answer, and what follows the answer.
    """
    found = _PROBED.setdefault(tokenizer, {})
    if (template, roles) not in found:
        found[template, roles] = _probe_once(tokenizer, template, roles)
    return found[template, roles]


def _probe_once(tokenizer: PreTrainedTokenizerBase, template: str, roles: tuple[str, ...]) -> tuple[str, str]:
    markers = [f"{_MARKERS[role]}{number}z" for number, role in enumerate(roles)]
    turns = [{"role": role, "content": marker} for role, marker in zip(roles, markers, strict=True)]
    asked = _apply(tokenizer, template, turns, add_generation_prompt=True)
    told = _apply(tokenizer, template, [*turns, {"role": "assistant", "content": _ANSWER}], add_generation_prompt=False)
    name = tokenizer.name_or_path or "the tokenizer"
    for role, marker in zip(roles, markers, strict=True):
        if marker not in asked or marker not in told:
            if marker not in asked and marker.casefold() in asked.casefold():
                raise StayalignedError(
                    f"the chat template of {name} changes the {role}'s turn: {marker!r} is not in {asked[-60:]!r}",
                    hint="Use a template that writes turns as they are.",
                )
            raise StayalignedError(
                f"the chat template of {name} leaves out the {role}'s turn: a model would be asked without it "
                f"({asked[-60:]!r})",
                hint=_HINTS["assistant" if role == "user" and "assistant" in roles else role],
            )
    place = told.rfind(_ANSWER)
    if place < 0 or place < max((told.rfind(marker) for marker in markers), default=-1):
        raise StayalignedError(
            f"the chat template of {name} does not show the answer after the request",
            hint="Its turns must be rendered from `role` and `content`, the answer last.",
        )
    header = told[len(asked) : place] if told.startswith(asked) else ""
    if header.strip() and asked == _apply(tokenizer, template, turns, add_generation_prompt=False):
        raise StayalignedError(
            f"the chat template of {name} ignores `add_generation_prompt`: the model would learn and write "
            f"{header!r} as a part of its answers",
            hint="Set `chat_template.file` to a copy of the template that ends with "
            f"{{% if add_generation_prompt %}}{{{{ {header!r} }}}}{{% endif %}}.",
        )
    if header.strip() and split_thoughts(opened_thoughts(asked) + header + _ANSWER).answer != _ANSWER:
        said = header
        for token in tokenizer.added_tokens_decoder.values():
            said = said.replace(token.content, "")
        if re.search(r"\w", said):
            raise StayalignedError(
                f"the chat template of {name} writes {header!r} before an answer, which would count as a part of it",
                hint="Set `chat_template.file` to a copy of the template whose generation prompt ends with it.",
            )
    if "{'type'" in asked or '{"type"' in asked:
        raise StayalignedError(
            f"the chat template of {name} writes a turn's content as a list",
            hint="Use a template that renders the text of a turn.",
        )
    return header, told[place + len(_ANSWER) :]


_HINTS = {
    "system": "Put the text of the system turn into the first user turn, or use a template with system turns.",
    "user": "Check the names that the template reads: a turn has `role` and `content`.",
    "assistant": "Use a template that renders several turns, or prompts of one turn.",
}


def _require_shown(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Message], text: str) -> None:
    """Check that a rendered text contains the content of every turn; of an earlier answer, without its thoughts."""
    for message in prompt:
        content = message.content
        if message.role == "assistant":
            content = split_thoughts(content).answer or ""
        if not is_shown(content, text):
            raise StayalignedError(
                f"the chat template changes or leaves out a part of a {message.role}'s turn, which begins with "
                f"{content.strip()[:60]!r}",
                hint="Some templates cut long turns, write other characters (upper case, HTML), or take out what looks "
                "like thoughts or control words: change the prompt, or the template.",
            )
        warn_if_space_differs(tokenizer, content, text)


def _warn_if_mark_inside(tokenizer: PreTrainedTokenizerBase, template: str, content: str) -> None:
    """Log once for a tokenizer that a turn holds what its template writes around turns, such as `<|im_end|>`."""
    found = _BINDINGS.setdefault(tokenizer, {})
    if ("", "mark") in found:
        return
    if (template, "marks") not in found:
        found[template, "marks"] = "\n".join(_marks_between(tokenizer, template))
    lines = {line.strip() for line in content.splitlines()}
    for mark in filter(None, found[template, "marks"].split("\n")):
        if mark in content if mark[0] in "<[" else any(line.startswith(mark) for line in lines):
            found["", "mark"] = mark
            _log.warning(
                "the chat template of %s writes %r between turns, which also occurs inside a turn: the model may read "
                "that turn as several (first: %r)",
                *(tokenizer.name_or_path or "the tokenizer", mark, content.strip()[:60]),
            )
            return


def _marks_between(tokenizer: PreTrainedTokenizerBase, template: str) -> list[str]:
    """Return what a template writes between a request, its answer and the next request, but for marks of thoughts."""
    request, answer = _MARKERS["user"], _ANSWER
    turns = [{"role": role, "content": f"{text}0z"} for role, text in (("user", request), ("assistant", answer))]
    for more in ([{"role": "user", "content": f"{request}1z"}], []):
        with suppress(StayalignedError):
            told = _apply(tokenizer, template, [*turns, *more], add_generation_prompt=bool(more))
            between = told.partition(f"{request}0z")[2].replace(f"{answer}0z", "\n").replace(f"{request}1z", "\n")
            return [mark for mark in dict.fromkeys(_MARK_OF_TURN.findall(between)) if not is_mark(mark)]
    return []


def _squeezed(text: str) -> str:
    return "".join(_SWITCH.sub("", text).split())


def _apply(
    tokenizer: PreTrainedTokenizerBase, template: str, turns: list[dict[str, str]], *, add_generation_prompt: bool
) -> str:
    try:
        return str(
            tokenizer.apply_chat_template(
                turns, chat_template=template, add_generation_prompt=add_generation_prompt, tokenize=False
            )
        )
    except Exception as error:  # a template is a program, which may fail in any way
        if isinstance(error, MemoryError):
            raise
        roles = ", ".join(turn["role"] for turn in turns)
        reason = " ".join(str(error).split())[:300]
        kind = "" if type(error).__name__ == "TemplateError" else f"{type(error).__name__}: "
        raise StayalignedError(
            f"the chat template rejects a conversation of the turns {roles}: {kind}{reason}",
            hint="The template is wrong, or needs a variable that it does not get: set that in chat_template.arguments "
            "or use another template, `chat_template.file`."
            if kind
            else "Many templates have no system turn, or need user and assistant alternating: change the prompts.",
        ) from None
