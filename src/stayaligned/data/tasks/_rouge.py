"""ROUGE F1 of a completion against a reference, in any script, with the library `rouge-score`."""

from __future__ import annotations

from functools import cache
from typing import Any, Literal

from stayaligned.core.extras import require_packages

Rouge = Literal["rouge1", "rouge2", "rougeL"]
ROUGE_PACKAGES = ("rouge_score", "regex")

# In scripts without spaces between words, one character (with its marks) is a word; in others, a run of letters, marks
# and digits.
_UNSPACED = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"
_WORD = rf"{_UNSPACED}\p{{M}}*|[\p{{L}}\p{{M}}\p{{N}}--{_UNSPACED}]+"


def rouge_f1(completion: str, reference: str, kind: Rouge) -> float | None:
    """Return 2PR / (P + R) of words (`rouge1`), word pairs (`rouge2`) or the longest common subsequence (`rougeL`).

    Lin 2004. Differs from the library's default, whose tokenizer drops every character that is not ASCII, so that a
    Chinese text scores 0 against itself. Here words are Unicode words, and in scripts without spaces each character is
    one. On ASCII text the two agree. No stemming, as in the library's default.

    Returns:
        0 to 1; None if the reference has no words.

    Raises:
        StayalignedError: if `rouge-score` is not installed.
    """
    scorer, tokenizer = _scorer(kind)
    if not tokenizer.tokenize(reference):
        return None
    return float(scorer.score(reference, completion)[kind].fmeasure)


@cache
def _scorer(kind: Rouge) -> tuple[Any, Any]:
    require_packages({kind: ROUGE_PACKAGES})
    import regex
    from rouge_score.rouge_scorer import RougeScorer

    word = regex.compile(_WORD, flags=regex.VERSION1)

    class Tokenizer:
        def tokenize(self, text: str) -> list[str]:
            return word.findall(text.casefold())

    tokenizer = Tokenizer()
    return RougeScorer([kind], use_stemmer=False, tokenizer=tokenizer), tokenizer
