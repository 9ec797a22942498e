"""Words and word triples of texts, by which texts are compared."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

_UNSPACED = (
    "\u0e00-\u0eff"  # Thai, Lao
    "\u1000-\u109f\u1780-\u17ff"  # Burmese, Khmer
    "\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff"  # Japanese syllables and marks
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Chinese characters
)
"""Characters of scripts that put no spaces between words."""
_TOKEN = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")


def split_words(text: str) -> list[str]:
    """Return the words of a text in lower case, without punctuation; the whole text if it has none.

    Each character of a script that puts no spaces between words, such as Chinese, Japanese and Thai, is a word.
    Invisible characters are removed.
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    visible = "".join(character for character in text if unicodedata.category(character) != "Cf")
    return _TOKEN.findall(visible) or [visible.strip()]


def word_triples(words: Sequence[str]) -> frozenset[str]:
    """Return every three words in a row; all words as one if there are fewer than three."""
    return frozenset(" ".join(words[i : i + 3]) for i in range(max(1, len(words) - 2)))
