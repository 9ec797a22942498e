"""Answers that are no language: empty, looping, broken. Text alone; imports no torch."""

from __future__ import annotations

import itertools
import math
import unicodedata
import zlib
from collections import Counter

from pydantic import BaseModel, ConfigDict, Field

from stayaligned.core.records import PromptSet, Record

_LONGEST_LOOP = 256
_READ = 4000
"""Characters of an answer that are looked at: its last, where loops end up."""
_JAPANESE_AND_KOREAN = {"HIRAGANA": "CJK", "KATAKANA": "CJK", "KATAKANA-HIRAGANA": "CJK", "HANGUL": "CJK"}


class Degeneration(BaseModel):
    """When an answer counts as degenerate: by any of these signs. null switches one off.

    The signs know no words and no spaces, so that they hold for any script, for code and for numbers. They can't see
    real words in a senseless order; only `perplexity` can.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    empty: bool = True
    """An answer without a visible character."""
    min_characters: int = Field(default=40, ge=1)
    """Shorter answers are too short for any sign but emptiness and broken characters: a label may be one word."""
    loop_share: float | None = Field(default=0.5, gt=0, le=1)
    """At least this share of the answer is one piece of text at least four times in a row."""
    min_compressed: float | None = Field(default=0.15, gt=0, le=1)
    """The answer's bytes are deflated to less than this share: repetition with small changes, in long answers."""
    min_entropy: float | None = Field(default=1.5, gt=0)
    """Bits a character, by the frequencies of the answer's own characters; below this it has next to no content."""
    broken_share: float | None = Field(default=0.05, gt=0, le=1)
    """At least this share are replacement, control, private or unassigned characters: pieces of bytes, no text."""
    script_changes: float | None = Field(default=0.2, gt=0, le=1)
    """At least this share of neighboring letters are of two scripts (Latin beside Thai), Chinese, Japanese and Korean
    counting as one."""
    perplexity: float | None = Field(default=None, gt=0)
    """Nats a token under the aligned model, given the prompt, above which an answer is babble. Off unless set: it
    loads that model once more, and what is usual depends on the model and the prompts. Above what any of the aligned
    model's own answers has, by a factor of two."""


class Degenerate(Record):
    """What was found of one answer."""

    prompt_set: PromptSet
    id: str
    reasons: tuple[str, ...]
    """Empty for an answer that is language, as far as can be seen."""
    nats: float | None = None
    """Mean negative log-likelihood a token under the aligned model; None where it was not asked for."""


def signs(text: str, settings: Degeneration, nats: float | None = None) -> tuple[str, ...]:
    """Why an answer counts as degenerate; nothing where it does not.

    Args:
        text: the answer.
        settings: the limits.
        nats: the answer's nats a token under the aligned model, if that was measured.
    """
    text = text.strip()[-_READ:]
    if not any(map(_is_visible, text)):
        return ("empty",) if settings.empty else ()
    found: list[str] = []
    if settings.broken_share is not None and (share := broken_share(text)) >= settings.broken_share:
        found.append(f"{share:.0%} broken characters")
    if settings.perplexity is not None and nats is not None and nats > settings.perplexity:
        found.append(f"{nats:.1f} nats a token")
    if len(text) < settings.min_characters:
        return tuple(found)
    if settings.loop_share is not None and (share := loop_share(text)) >= settings.loop_share:
        found.append(f"{share:.0%} one loop")
    if settings.min_compressed is not None and (share := compressed_share(text)) < settings.min_compressed:
        found.append(f"deflated to {share:.0%}")
    if settings.min_entropy is not None and (bits := entropy(text)) < settings.min_entropy:
        found.append(f"{bits:.1f} bits a character")
    if settings.script_changes is not None and (share := script_changes(text)) >= settings.script_changes:
        found.append(f"script changes at {share:.0%} of letters")
    return tuple(found)


def loop_share(text: str) -> float:
    """Share of the longest stretch that is one piece of text at least four times in a row."""
    import numpy as np

    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    longest = 0
    for period in range(1, min(len(points) // 4, _LONGEST_LOOP) + 1):
        breaks = np.flatnonzero(points[period:] != points[:-period])
        # The longest run of characters that equal the one a period before.
        most = int(np.diff(breaks, prepend=-1, append=len(points) - period).max()) - 1
        if most >= 3 * period:
            longest = max(longest, most + period)
    return longest / max(1, len(points))


def compressed_share(text: str) -> float:
    """Bytes after deflating the text, as a share of its UTF-8 bytes."""
    content = text.encode("utf-8", "surrogatepass")
    return len(zlib.compress(content, 9)) / max(1, len(content))


def entropy(text: str) -> float:
    """Shannon entropy of the text's characters, in bits a character."""
    return -sum(n / len(text) * math.log2(n / len(text)) for n in Counter(text).values()) if text else 0.0


def broken_share(text: str) -> float:
    """Share of characters that no text holds: U+FFFD, controls but for line breaks and tabs, private, unassigned."""
    return sum(map(_is_broken, text)) / len(text) if text else 0.0


def script_changes(text: str) -> float:
    """Share of the pairs of neighboring letters that are of two scripts; 0 where there are fewer than two letters."""
    scripts = [_script(character) for character in text if character.isalpha()]
    pairs = [*itertools.pairwise(scripts)]
    return sum(one != other for one, other in pairs) / max(1, len(pairs))


def _is_broken(character: str) -> bool:
    return character == "\ufffd" or (
        unicodedata.category(character) in {"Cc", "Co", "Cn", "Cs"} and character not in "\n\r\t"
    )


def _is_visible(character: str) -> bool:
    return not character.isspace() and unicodedata.category(character) not in {"Cc", "Cf"}


def _script(letter: str) -> str:
    first = unicodedata.name(letter, "").partition(" ")[0]
    return _JAPANESE_AND_KOREAN.get(first, first)
