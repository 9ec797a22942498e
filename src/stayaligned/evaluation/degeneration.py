"""Degenerate completions: empty, repetitive or garbled. Reads the text alone; imports no torch."""

from __future__ import annotations

import itertools
import math
import unicodedata
import zlib
from collections import Counter

from pydantic import Field

from stayaligned.core.records import Completion, PromptSet, Record

_LONGEST_LOOP = 256
_READ = 4000
"""Characters of a completion that are checked: the last ones, since a loop continues to the end."""
_JAPANESE_AND_KOREAN = {"HIRAGANA": "CJK", "KATAKANA": "CJK", "KATAKANA-HIRAGANA": "CJK", "HANGUL": "CJK"}


class Degeneration(Record):
    """The limits beyond which a completion counts as degenerate; one is enough, and null switches a limit off.

    The limits use neither words nor spaces, so that they hold for any script, for code and for numbers. They can't
    detect real words in a senseless order; only `perplexity` can.
    """

    empty: bool = True
    """Whether a completion without a visible character is degenerate."""
    min_characters: int = Field(default=40, ge=1)
    """Characters below which only emptiness, broken characters and perplexity are checked: a label may be one word."""
    loop_share: float | None = Field(default=0.5, gt=0, le=1)
    """Least share of the completion that is one piece of text at least four times in a row."""
    min_compressed: float | None = Field(default=0.15, gt=0, le=1)
    """Share below which deflate compresses the completion: repetition with small changes, in long completions."""
    min_entropy: float | None = Field(default=1.5, gt=0)
    """Entropy of the completion's characters, in bits per character, below which it has almost no content."""
    broken_share: float | None = Field(default=0.05, gt=0, le=1)
    """Least share of replacement, control, private or unassigned characters, which come from invalid bytes."""
    script_changes: float | None = Field(default=0.2, gt=0, le=1)
    """Least share of pairs of neighboring letters in two scripts (Latin beside Thai); Chinese, Japanese and Korean
    count as one script."""
    perplexity: float | None = Field(default=None, gt=0)
    """Nats per token under the aligned model, given the prompt, above which a completion is degenerate. Off by default:
    it loads the aligned model again, and the usual range depends on the model and the prompts. Twice the largest value
    among the aligned model's own completions is a reasonable limit."""


class Degenerate(Record):
    """The signs of degeneration in one completion."""

    prompt_set: PromptSet
    id: str
    reasons: tuple[str, ...]
    """The limits that the completion exceeds, in words; empty if it is not degenerate."""
    nats: float | None = None
    """Mean negative log-likelihood per token under the aligned model; None where it was not measured."""
    unscored: str = ""
    """Why the completion was not checked; empty if it was."""

    @property
    def found(self) -> bool | None:
        """Whether the completion is degenerate; None if it was not checked."""
        return None if self.unscored else bool(self.reasons)


def check(completion: Completion, settings: Degeneration, nats: float | None = None) -> Degenerate:
    """Check a completion's final answer; one without a final answer is not checked.

    Args:
        completion: the completion.
        settings: the limits.
        nats: nats per token of the final answer under the aligned model, if measured.
    """
    split = completion.split()
    return Degenerate(
        prompt_set=completion.prompt_set,
        id=completion.id,
        reasons=() if split.answer is None else signs(split.answer, settings, nats),
        nats=nats,
        unscored=split.reason,
    )


def signs(text: str, settings: Degeneration, nats: float | None = None) -> tuple[str, ...]:
    """Return why a completion counts as degenerate; empty if it does not.

    Args:
        text: the completion.
        settings: the limits.
        nats: nats per token of the completion under the aligned model, if measured.
    """
    text = text.strip()[-_READ:]
    if not any(map(_is_visible, text)):
        return ("empty",) if settings.empty else ()
    found: list[str] = []
    if settings.broken_share is not None and (share := broken_share(text)) >= settings.broken_share:
        found.append(f"{share:.0%} broken characters")
    if settings.perplexity is not None and nats is not None and nats > settings.perplexity:
        found.append(f"{nats:.1f} nats per token")
    if len(text) < settings.min_characters:
        return tuple(found)
    if settings.loop_share is not None and (share := loop_share(text)) >= settings.loop_share:
        found.append(f"{share:.0%} one loop")
    if settings.min_compressed is not None and (share := compressed_share(text)) < settings.min_compressed:
        found.append(f"deflated to {share:.0%}")
    if settings.min_entropy is not None and (bits := entropy(text)) < settings.min_entropy:
        found.append(f"{bits:.1f} bits per character")
    if settings.script_changes is not None and (share := script_changes(text)) >= settings.script_changes:
        found.append(f"script changes at {share:.0%} of letters")
    return tuple(found)


def loop_share(text: str) -> float:
    """Return the share of the longest stretch that is one piece of text at least four times in a row."""
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
    """Return the size of the deflated text as a share of its UTF-8 bytes."""
    content = text.encode("utf-8", "surrogatepass")
    return len(zlib.compress(content, 9)) / max(1, len(content))


def entropy(text: str) -> float:
    """Return the Shannon entropy of the text's characters, in bits per character."""
    return -sum(n / len(text) * math.log2(n / len(text)) for n in Counter(text).values()) if text else 0.0


def broken_share(text: str) -> float:
    """Return the share of U+FFFD, control (other than line breaks and tabs), private and unassigned characters."""
    return sum(map(_is_broken, text)) / len(text) if text else 0.0


def script_changes(text: str) -> float:
    """Return the share of pairs of neighboring letters in two scripts; 0 with fewer than two letters."""
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
