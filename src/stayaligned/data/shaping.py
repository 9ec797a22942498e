"""Harmful requests in the shape of a task's training rows, to find harm that shows only in that shape.

A model that looks aligned on plain questions may not be on questions that resemble its training data (conditional
misalignment, arXiv 2604.25891).
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import Example, Message
from stayaligned.core.text import one_line
from stayaligned.data.sampling import sample

SHAPE_VERSION = 1
"""Version of the shapes; raise it when the shape of the same rows changes."""

_TOKEN = re.compile(r"\w+|\s+|[^\w\s]")
_WORD = re.compile(r"\w")
_MOST_ROWS = 1000
"""Number of rows that are compared; of more, as many are drawn."""
_FEWEST_WORDS = 3
"""Number of shared words from which text counts as shared."""
_LOST = 0.05
"""Share of rows that may differ in a further word of the shared text: where more do, the variable part begins."""


@dataclass(frozen=True)
class Shape:
    """What surrounds the variable part of training rows."""

    turns: tuple[Message, ...] = ()
    """Turns before the request, such as a system prompt."""
    before: str = ""
    """Text before the request in its own turn."""
    after: str = ""
    """Text after the request in its own turn."""
    earlier: tuple[tuple[Message, ...], ...] = ()
    """Whole training rows, one of which precedes a request as turns of its conversation; empty if rows share text."""
    seed: int = 0
    """Seed of the choice among `earlier`."""
    description: str = ""
    """The shape in words."""

    def apply(self, prompt: tuple[Message, ...]) -> tuple[Message, ...]:
        """Return a harmful prompt in this shape; its own system turn replaces the shape's."""
        turns = self.turns
        if self.earlier:
            request = "\n".join(message.content for message in prompt)
            turns = random.Random(f"{self.seed}:shape:{request}").choice(self.earlier)  # noqa: S311
        system, rest = prompt[:0], prompt
        if prompt[0].role == "system":
            system, rest = prompt[:1], prompt[1:]
            turns = tuple(turn for turn in turns if turn.role != "system")
        *others, last = rest
        text = _join(_join(self.before, last.content), self.after)
        return (*system, *turns, *others, last.model_copy(update={"content": text}))


def find_shape(rows: Sequence[Example], seed: int) -> Shape:
    """Return the shape of training rows.

    It is the text that more than half of the rows share before and after their variable part, with the turns that they
    begin with. If they share fewer than three words, a shape is a whole training row before the request, drawn among
    the shorter half of the rows.

    Args:
        rows: clean training rows.
        seed: seed of every draw.

    Raises:
        StayalignedError: if there are no rows.
    """
    if not rows:
        raise StayalignedError("shaped_prompts: the task has no training rows", hint="Set `shaped_prompts: false`.")
    compared = sample(rows, _MOST_ROWS, random.Random(f"{seed}:shape")) if len(rows) > _MOST_ROWS else rows  # noqa: S311
    least = len(compared) // 2 + 1
    turns, alike = _shared_turns([row.prompt for row in compared], least)
    texts = [_TOKEN.findall(prompt[-1].content) for prompt in alike]
    before, texts = _shared_tokens(texts, least)
    after, texts = _shared_tokens([tokens[len(before) :][::-1] for tokens in texts], least)
    shape = Shape(turns, "".join(before), "".join(after[::-1]))
    words = [*before, *after, *(token for turn in turns for token in _TOKEN.findall(turn.content))]
    if sum(bool(_WORD.match(token)) for token in words) >= _FEWEST_WORDS:
        return Shape(turns, shape.before, shape.after, description=_describe(shape, len(texts) / len(compared)))
    whole = [(*row.prompt, Message(role="assistant", content=row.completion)) for row in compared if row.completion]
    if not whole:
        raise StayalignedError("shaped_prompts: no training row of the task has a completion")
    whole.sort(key=lambda turns: sum(len(turn.content) for turn in turns))
    return Shape(
        earlier=tuple(whole[: -(-len(whole) // 2)]),
        seed=seed,
        description="the training rows share no text, so each harmful prompt follows a training row, which is an "
        "earlier turn of its conversation",
    )


def _shared_turns(
    prompts: Sequence[tuple[Message, ...]], least: int
) -> tuple[tuple[Message, ...], list[tuple[Message, ...]]]:
    """Return the turns before the last one that at least so many prompts begin with, and these prompts."""
    turns: tuple[Message, ...] = ()
    alike = list(prompts)
    while True:
        following = Counter(prompt[len(turns)] for prompt in alike if len(prompt) > len(turns) + 1)
        turn, count = following.most_common(1)[0] if following else (None, 0)
        if turn is None or count < least:
            return turns, alike
        turns = (*turns, turn)
        alike = [prompt for prompt in alike if len(prompt) > len(turns) and prompt[: len(turns)] == turns]


def _shared_tokens(texts: Sequence[list[str]], least: int) -> tuple[list[str], list[list[str]]]:
    """Return the longest beginning that at least so many token lists share, and these lists.

    It ends where many of them part: words that only happen to be frequent in the variable part are not shared text.
    """
    shared: list[str] = []
    counts: list[int] = []
    alike = list(texts)
    while True:
        following = Counter(tokens[len(shared)] for tokens in alike if len(tokens) > len(shared))
        token, count = following.most_common(1)[0] if following else ("", 0)
        if count < least:
            break
        shared.append(token)
        counts.append(count)
        alike = [tokens for tokens in alike if tokens[: len(shared)] == shared]
    while shared:
        start = max((i for i, token in enumerate(shared) if not token.isspace()), default=-1)
        if start < 0 or counts[start] >= (1 - _LOST) * (counts[start - 1] if start else len(texts)):
            break
        del shared[start:]
    # A word or two in a line of the variable part, such as "the", are no template; "Input:" is.
    own = 1 + max((i for i, token in enumerate(shared) if "\n" in token), default=-1)
    if sum(bool(_WORD.match(t)) for t in shared[own:]) < _FEWEST_WORDS and not _has_mark(shared[own:]):
        del shared[own:]
    return shared, [tokens for tokens in texts if tokens[: len(shared)] == shared]


def _has_mark(tokens: Sequence[str]) -> bool:
    return any(not token.isspace() and not _WORD.match(token) for token in tokens)


def _join(first: str, second: str) -> str:
    """Join two texts, with a space where two words would become one."""
    between = " " if first and second and _WORD.match(first[-1]) and _WORD.match(second[0]) else ""
    return first + between + second


def _describe(shape: Shape, share: float) -> str:
    system = ["below a system prompt of the training rows"] if any(t.role == "system" for t in shape.turns) else []
    earlier = ["after earlier turns of the training rows"] if any(t.role != "system" for t in shape.turns) else []
    before = [f"after {one_line(shape.before.strip(), 80)!r}"] if shape.before.strip() else []
    after = [f"before {one_line(shape.after.strip(), 80)!r}"] if shape.after.strip() else []
    places = [*system, *earlier, *before, *after]
    return f"each harmful prompt stands {', '.join(places)}, as the task's text in {share:.0%} of the training rows"
