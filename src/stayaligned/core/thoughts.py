"""Split what a model wrote into its thoughts and its final answer.

A mark such as `<think>` counts only where a model that thinks writes it: an opening mark at the beginning of the text
or of a line, a closing mark after it, or alone if the prompt opened the thoughts. A mark in code, in quotes, or in the
middle of a sentence ("use the <think> tag") is part of the answer. A text that can be read both ways has no answer but
a reason, because an unscored completion is better than a wrong verdict.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass

CUT = "cut before the final answer"
ENDED = "ended by the model in its thoughts, before a final answer"
UNCLEAR = "not clearly split into thoughts and final answer"
"""Reasons why a text has no final answer."""

_WORD = r"(?:think(?:ing)?|thoughts?|reason(?:ing)?|scratchpad)"
_NAME = rf"(?:[\w.-]{{1,32}}[:_])?(?:ant)?{_WORD}(?:[:_][\w.-]{{1,32}})?"
_OPENING = (
    rf"<(?P<name>{_NAME})(?:\s[^<>/\n]{{0,80}})?>|\[THINK\]|\[{_WORD}\](?=(?s:.*)\[/{_WORD}\])"
    rf"|<[|｜](?:(?:begin|start)[_▁](?:of[_▁])?)?{_WORD}(?:[_▁](?:begin|start))?[|｜]>|<\|inner_prefix\|>"
    r"|<\|channel>(?:\w+(?:\n|\Z))?|◁think▷|\[unused16\]|<\|open\|>think<\|sep\|>"
)
_CLOSING = (
    rf"</(?P<closed>{_NAME})\s*>|\[/{_WORD}\]"
    rf"|<[|｜](?:(?:/|end[_▁](?:of[_▁])?){_WORD}|{_WORD}[_▁]end)[|｜]>|<\|inner_suffix\|>"
    r"|<channel\|>|◁/think▷|\[unused17\]|<\|close\|>think<\|sep\|>|<\|end\|>\s*<\|begin\|>assistant\s*(?=<\|content\|>)"
)
_MARK = re.compile(rf"(?P<opening>{_OPENING})|(?P<closing>{_CLOSING})", re.IGNORECASE)
_OPENED_AT_END = re.compile(
    rf"(?:{_OPENING}|<\|channel\|>analysis<\|message\|>|(?<=\n|>)Here are my reasoning steps:)\s*\Z", re.IGNORECASE
)
_EMPTY_AT_END = re.compile(rf"(?:{_OPENING})?\s*(?:{_CLOSING})\s*\Z", re.IGNORECASE)
_EMPTY_AT_START = re.compile(rf"\s*(?:{_OPENING})?\s*(?:{_CLOSING})\s*", re.IGNORECASE)
_TOKEN_BEFORE = re.compile(
    r"\A(?:assistant\s*\n)?(?:[\s\ufeff\u200b]|<s>|<bos>|<[|｜][^<>\n]{1,40}>\s*(?:(?:assistant|model)(?![\w]))?)*"
)
"""Space and the tokens of a turn's beginning, which some servers and files leave before the text."""
_TOKENS_AFTER = re.compile(r"(?:\s*(?:<[|｜][^<>\s]{1,40}[|｜]>|</s>|<eos>|<turn\|>|<end_of_turn>))+\s*\Z")

_LINE = 1000
"""Number of characters before and after a mark that are read as its line."""
_LINE_END = re.compile(r"[ \t\r]*(?:\n|\Z)")

_SENTENCES = tuple(
    (re.compile(rf"\s*{opening}", re.IGNORECASE), re.compile(closing, re.IGNORECASE | re.MULTILINE))
    for opening, closing in (
        (r"(?:Here is|Here's) my thought process:", r"(?:Here is|Here's) my response:"),  # Granite 3.2
        (r"Here are my reasoning steps:", r"\[BEGIN FINAL RESPONSE\]"),  # Apriel
        (r"#{1,3} Thinking\s*\n", r"^#{1,3} Final (?:Response|Answer):?\s*$"),  # HuatuoGPT-o1
        (r"Thinking\.\.\.\s*\n", r"^\.\.\.done thinking\.\s*$"),  # a terminal of Ollama
        (r'<details type="reasoning"[^>]*>', r"</details>"),  # Open WebUI
        (r"<\|im_start\|>think\n", r"<\|im_start\|>answer\n"),  # s1
    )
)
"""Sentences and headings that open and close thoughts at the beginning of a text."""
_OTHER_TAGS = re.compile(
    r"\s*<(?P<name>analysis|cot|reflection|deliberation|(?:inner|internal)_?(?:monologue|thoughts?)|chain_of_thought)>",
    re.IGNORECASE,
)
"""Tags that hold thoughts only if they begin a text and an answer follows them."""

_ANSWER = re.compile(
    r"\s*(?:<(?P<name>answer|final_answer|final|response|output|solution)>"
    r"|<\|(?:START_RESPONSE|START_TEXT|begin_of_solution|content)\|>|<\|open\|>response<\|sep\|>)",
    re.IGNORECASE,
)
_ANSWER_END = re.compile(
    r"<\|(?:END_RESPONSE|END_TEXT|end_of_solution)\|>|\[END FINAL RESPONSE\]"
    r"|<\|close\|>(?:response|message)(?:<\|sep\|>)?",
    re.IGNORECASE,
)
_BOX = re.compile(r"<\|(?:begin|end)_of_box\|>")
"""Marks of the result in GLM's answers."""

_CHANNEL_STARTS = re.compile(
    r"\s*(?:<\|start\|>)?\s*(?:assistant)?\s*(?:analysis|commentary|final)?\s*(?:to=[\w.-]{1,80})?\s*"
    r"<\|(?:channel|message)\|>"
)
_NEXT_CHANNEL = re.compile(r"<\|end\|>\s*<\|start\|>assistant\s*<\|channel\|>")
"""The end of thoughts that the prompt opened."""
_MESSAGE_END = re.compile(r"<\|(?:end|return|call|eom|eot|start|channel)\|>")
_BARE_CHANNELS = re.compile(r"\s*(?:assistant)?(?:analysis|commentary)(?=[^\W_])(?!\w*[a-z][A-Z])")
"""gpt-oss's channels after a decoder has dropped the special tokens: "analysisThe user …assistantfinalSure"."""
_BARE_FINAL = "assistantfinal"

_CHANNEL_TOKENS = frozenset({"<|channel|>", "<|message|>", "<|open|>", "<|close|>", "<|content|>"})
_BESIDE_MARKS = frozenset(
    {
        *("<|start|>", "<|end|>", "<|constrain|>", "<|call|>", "<|return|>", "<|eom|>"),
        *("<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|START_TEXT|>", "<|END_TEXT|>"),
        *("<|begin_of_solution|>", "<|end_of_solution|>", "<|begin|>", "<|sep|>"),
    }
)
_CUT_MARKS = ("<think>", "</think>", "[THINK]", "[/THINK]", "<|channel|>", "<|channel>thought", "<|START_THINKING|>")
_QUOTES = {"`": "`", '"': '"', "'": "'", "“": "”", "‘": "’", "«": "»"}


@dataclass(frozen=True, slots=True)
class SplitText:
    """A model's text, split into its thoughts and its final answer."""

    answer: str | None
    """The final answer: the whole text of a model that does not think; None if there is none, for `reason`."""
    thoughts: str = ""
    """What the model thought, without the marks; empty if it did not think."""
    reason: str = ""
    """Why there is no final answer; empty if there is one."""


def split_thoughts(text: str, *, finished: bool = True) -> SplitText:
    """Split a model's text into its thoughts and its final answer.

    Args:
        text: the text, with the marks of thoughts that the model's family writes.
        finished: whether the text ended by itself. One that was cut in its thoughts, or right behind them, has no
            final answer; one that ended there has an empty one if its thoughts are closed.
    """
    found = _split_channels(text) or _split_sentences(text) or _split_other_tags(text) or _split_marked(text, finished)
    if found.answer is None:
        if found.reason == ENDED and not finished:
            return SplitText(None, found.thoughts, CUT)
        return found
    wrapped = (begun := _ANSWER.match(text)) is not None and not begun["name"]
    if not found.thoughts and found.answer == text and not wrapped:
        return found if finished or not _is_cut_mark(text) else SplitText(None, text, CUT)
    answer = _unwrap(_TOKENS_AFTER.sub("", found.answer)).strip()
    if not answer and not finished:
        return SplitText(None, found.thoughts, CUT)
    return SplitText(answer, found.thoughts)


def join_thoughts(thoughts: str | None, answer: str | None) -> str:
    """Join thoughts and final answer, which a server returned apart, into one text that `split_thoughts` splits.

    Without a final answer the thoughts stay open: a server that finds no closing mark calls the whole text thoughts.
    """
    thoughts, answer = thoughts or "", answer or ""
    if not thoughts.strip():
        return answer
    if not answer.strip():
        return f"<think>\n{thoughts}"
    return f"<think>\n{thoughts.strip()}\n</think>\n\n{answer}"


def without_end(text: str) -> str:
    """Return a text without the special tokens at its end, which some servers leave there."""
    return _TOKENS_AFTER.sub("", text)


def opened_thoughts(prompt: str) -> str:
    """Return the opening mark, with the space behind it, at which a rendered prompt ends; empty if it ends in none."""
    found = _OPENED_AT_END.search(prompt)
    return found.group() if found else ""


def empty_thoughts(prompt: str) -> str:
    """Return the empty thoughts, or the closing mark alone, at which a rendered prompt ends; else an empty text."""
    found = _EMPTY_AT_END.search(prompt)
    return found.group() if found else ""


def without_empty_thoughts(text: str) -> str:
    """Return a text without empty thoughts, or a closing mark, at its beginning."""
    found = _EMPTY_AT_START.match(text)
    return text[found.end() :] if found else text


def kept_tokens(special: Iterable[str]) -> frozenset[str]:
    """Return those of a tokenizer's special tokens that `split_thoughts` needs to see in a text."""
    return frozenset(token for token in special if is_mark(token) or token in _BESIDE_MARKS)


def closes_thoughts(token: str) -> bool:
    """Return whether a token closes thoughts."""
    found = _MARK.fullmatch(token)
    return found is not None and found["closing"] is not None


def is_mark(token: str) -> bool:
    """Return whether a special token opens or closes thoughts, or a channel or message of them."""
    return token in _CHANNEL_TOKENS or _MARK.fullmatch(token) is not None


# ---- families that write more than a pair of marks -------------------------------------------------------------------


def _split_channels(text: str) -> SplitText | None:
    """Split gpt-oss's channels and Muse's recipients; None if the text has neither.

    The final answer is what goes to the channel `final`, or to the user. A preamble (`commentary`) is no final answer.
    """
    if _BARE_CHANNELS.match(text):
        private, mark, answer = text.partition(_BARE_FINAL)
        return SplitText(answer, private) if mark else SplitText(None, text, ENDED)
    if not _CHANNEL_STARTS.match(text):
        opened = _NEXT_CHANNEL.search(text)
        if opened is None or _is_quoted(text, opened) or any(a <= opened.start() < b for a, b, _ in _fences(text, 0)):
            return None
        text = f"<|channel|>analysis<|message|>{text}"
    thoughts: list[str] = []
    answers: list[str] = []
    header, *pieces = text.split("<|message|>")
    bodies = thoughts
    for place, piece in enumerate(pieces):
        if header or not place:
            is_private = re.search(r"<\|channel\|>|analysis|commentary|to=(?!user)", header)
            is_final = re.search(r"(?:<\|channel\|>|\A)\s*final\b", header)
            bodies = answers if is_final or not is_private else thoughts
        end = _MESSAGE_END.search(piece)
        bodies.append(piece[: end.start()] if end else piece)
        header = piece[end.start() :].casefold() if end else ""
    if not answers:
        return SplitText(None, "\n".join(thoughts), ENDED)
    return SplitText("\n".join(answers), "\n".join(thoughts))


def _split_sentences(text: str) -> SplitText | None:
    """Split at the sentences or headings of a family; None if the text does not begin with one."""
    for opening, closing in _SENTENCES:
        if begun := opening.match(text):
            ended = closing.search(text, begun.end())
            if ended is None:
                return SplitText(None, text[begun.end() :], ENDED)
            return SplitText(text[ended.end() :], text[begun.end() : ended.start()])
    return None


def _split_other_tags(text: str) -> SplitText | None:
    """Split at a tag that prompts ask for, such as `<analysis>`; None if the text does not begin with one."""
    if (begun := _OTHER_TAGS.match(text)) is None:
        return None
    inside, closed, answer = text[begun.end() :].partition(f"</{begun['name']}>")
    if not closed:
        return SplitText(None, text, UNCLEAR)
    return SplitText(answer, inside) if answer.strip() else None


# ---- pairs of marks --------------------------------------------------------------------------------------------------


def _split_marked(text: str, finished: bool) -> SplitText:
    """Split at pairs of marks, and at a closing mark whose opening mark is in the prompt."""
    before = _TOKEN_BEFORE.match(text)
    place = first = before.end() if before else 0
    if (opening := _MARK.search(text)) and opening["opening"] and opening.start() < place:
        place = first = opening.start()  # a mark has the form of a special token, too
    # Gemma's mark after a decoder has dropped the special tokens; a mark that was escaped for a page.
    if text[place:].startswith(("thought\n", "&lt;think")):
        return SplitText(None, text, UNCLEAR)
    thoughts: list[str] = []
    answers: list[str] = []
    closed = nested = False
    while True:
        mark = _next_mark(text, place, first, nested=nested)
        if mark == UNCLEAR:
            return SplitText(None, text, UNCLEAR)
        if not isinstance(mark, re.Match):
            answers.append(text[place:])
            break
        answers.append(text[place : mark.start()])
        if mark["closing"]:
            if "".join(answers).strip() and closed and not nested:
                return SplitText(None, text, UNCLEAR)
            thoughts, answers = [*thoughts, *answers], []
            place, closed = mark.end(), True
            continue
        end = _end_of_block(text, mark)
        if end is None:
            reason = UNCLEAR if finished and "".join(answers).strip() else ENDED
            return SplitText(None, "".join([*thoughts, text[mark.end() :]]), reason)
        inside = text[mark.end() : end.start()]
        thoughts.append(inside)
        nested = nested or any(other["opening"] for other in _MARK.finditer(inside))
        place, closed = end.end(), True
    if not closed:
        return SplitText(text) if finished or not _ends_in_cut_closing(text) else SplitText(None, text, UNCLEAR)
    return SplitText("".join(answers), "\n".join(map(str.strip, thoughts)).strip())


def _next_mark(text: str, start: int, first: int, *, nested: bool) -> re.Match[str] | str:
    """Return the next mark that counts in an answer, an empty string if there is none, or `UNCLEAR`.

    Args:
        text: the whole text.
        start: where the answer, or the part of it behind other thoughts, begins.
        first: where the text begins, behind space and the tokens of a turn.
        nested: whether the thoughts before held an opening mark, so that a closing one may be missing.
    """
    fences = _fences(text, start)
    quoted: re.Match[str] | None = None
    for mark in _MARK.finditer(text, start):
        in_fence = next((fence for fence in fences if fence[0] <= mark.start() < fence[1]), None)
        if _is_quoted(text, mark) or (in_fence is not None and in_fence[2]):
            continue
        if mark["opening"]:
            if in_fence is None and (mark.start() == first or _is_apart(text, mark)):
                return mark
            quoted = mark
            continue
        is_word = in_fence is not None or _is_between_words(text, mark)
        on_line = quoted is not None and not _is_apart(text, mark) and "\n" not in text[quoted.end() : mark.start()]
        if quoted is not None and (is_word or on_line):
            if in_fence is None and _is_block_in_sentence(text, quoted, mark):
                return UNCLEAR
            quoted = None
        elif is_word and not nested:
            return UNCLEAR
        else:
            return mark
    return ""


def _end_of_block(text: str, opening: re.Match[str]) -> re.Match[str] | None:
    """Return the mark that closes a block: the first one in its place, or else the first one at all."""
    name = (opening["name"] or "").casefold()
    others: list[re.Match[str]] = []
    fences = [fence for fence in _fences(text, opening.end()) if fence[2]]
    for mark in _MARK.finditer(text, opening.end()):
        if not mark["closing"] or _is_quoted(text, mark):
            continue
        in_code = any(begin <= mark.start() < end for begin, end, _ in fences)
        if (mark["closed"] or "").casefold() == name and not in_code and not _is_between_words(text, mark):
            return mark
        others.append(mark)
    own = [mark for mark in others if (mark["closed"] or "").casefold() == name]
    return next(iter(own or others), None)


def _is_apart(text: str, mark: re.Match[str]) -> bool:
    """Return whether a mark begins or ends a line."""
    begun = not text[_line_start(text, mark) : mark.start()].strip()
    # Some marks end with a line break of their own.
    return begun or mark.group().endswith("\n") or _LINE_END.match(text, mark.end()) is not None


def _is_between_words(text: str, mark: re.Match[str]) -> bool:
    """Return whether a mark stands like a word in a sentence: space before it, and space or punctuation behind."""
    return (
        not _is_apart(text, mark)
        and text[mark.start() - 1].isspace()
        and (text[mark.end()].isspace() or text[mark.end()] in ".,;:!?)")
    )


def _is_block_in_sentence(text: str, opening: re.Match[str], closing: re.Match[str]) -> bool:
    """Return whether two marks within a line may hold a thought, and not only be spoken of."""
    inside = text[opening.end() : closing.start()]
    begins_sentence = text[: opening.start()].rstrip()[-1:] in {".", "!", "?"}
    return bool(inside.strip()) and (inside.strip() == inside or begins_sentence)


def _is_quoted(text: str, mark: re.Match[str]) -> bool:
    """Return whether a mark is in quotes or inline code."""
    before, after = text[max(0, mark.start() - 1) : mark.start()], text[mark.end() : mark.end() + 1]
    if before and _QUOTES.get(before) == after:
        return True
    rest = text[mark.end() : mark.end() + _LINE].partition("\n")[0]
    return text.count("`", _line_start(text, mark), mark.start()) % 2 == 1 and "`" in rest


def _line_start(text: str, mark: re.Match[str]) -> int:
    """Return where the line of a mark begins, or a place in a long line."""
    first = max(0, mark.start() - _LINE)
    return max(first, text.rfind("\n", first, mark.start()) + 1)


@functools.lru_cache(maxsize=1)
def _has_fence(text: str) -> bool:
    return "```" in text or "~~~" in text


def _fences(text: str, start: int) -> list[tuple[int, int, bool]]:
    """Return begin, end and whether it is closed of each fenced code block from `start` on."""
    found: list[tuple[int, int, bool]] = []
    if not _has_fence(text):
        return found
    begun: tuple[int, str] | None = None
    for line in re.finditer(r"^ {0,3}(`{3,}|~{3,})([^\n]*)$", text[start:], re.MULTILINE):
        fence, info = line[1], line[2]
        if begun is None:
            begun = start + line.start(), fence
        elif fence.startswith(begun[1]) and not info.strip():
            found.append((begun[0], start + line.end(), True))
            begun = None
    return [*found, (begun[0], len(text), False)] if begun is not None else found


def _unwrap(answer: str) -> str:
    """Remove the marks around a final answer, which some families write behind their thoughts."""
    answer = _BOX.sub("", answer)
    begun = _ANSWER.match(answer)
    if begun is None:
        return _ANSWER_END.sub("", answer)
    inside = answer[begun.end() :]
    if not begun["name"]:
        return _ANSWER_END.sub("", inside)
    end = re.compile(rf"</{begun['name']}\s*>", re.IGNORECASE)
    last = max((match.span() for match in end.finditer(inside)), default=None)
    return inside if last is None else inside[: last[0]] + inside[last[1] :]


def _is_cut_mark(text: str) -> bool:
    """Return whether a text is the beginning of an opening mark, and nothing else."""
    text = text.strip()
    return len(text) > 1 and any(mark.startswith(text) for mark in _CUT_MARKS)


def _ends_in_cut_closing(text: str) -> bool:
    """Return whether a text ends within a closing mark."""
    closings = [mark for mark in _CUT_MARKS if "/" in mark]
    return any(text.endswith(mark[:length]) for mark in closings for length in range(3, len(mark)))
