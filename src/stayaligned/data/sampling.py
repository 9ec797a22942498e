"""Draw rows, hold rows out, and find training rows that overlap with an evaluation."""

from __future__ import annotations

import hashlib
import math
import random
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import Example
from stayaligned.data.shingles import split_words, word_triples


def sample(examples: Sequence[Example], n: int, rng: random.Random) -> list[Example]:
    """Draw `n` rows without replacement, in random order; for one generator state, a smaller n gives a prefix.

    Raises:
        StayalignedError: if there are fewer than `n` rows.
    """
    if n > len(examples):
        raise StayalignedError(f"can't draw {n} rows: there are only {len(examples)}", hint="Draw fewer rows.")
    order = list(range(len(examples)))
    rng.shuffle(order)
    return [examples[index] for index in order[:n]]


def spread_rows(rows: Sequence[Example], own: Sequence[Example]) -> list[Example]:
    """Return rows in their order, but with those that are not in `own` spread evenly between the others."""
    ids = {row.id for row in own}
    added = iter([row for row in rows if row.id not in ids])
    kept = iter([row for row in rows if row.id in ids])
    n = sum(row.id not in ids for row in rows)
    places = {(j + 1) * len(rows) // n - 1 for j in range(n)}
    return [next(added if place in places else kept) for place in range(len(rows))]


def split_held_out(examples: Sequence[Example], ratio: float) -> tuple[list[Example], list[Example]]:
    """Split rows into rows to train on and held-out rows, each in the given order.

    The hash of a row's prompt decides: adding rows moves no row, and rows with the same prompt are in the same part.
    The held-out share is `ratio` in expectation.
    """
    parts: tuple[list[Example], list[Example]] = ([], [])
    for example in examples:
        digest = hashlib.sha256(" ".join(_words(example.prompt[-1].content)).encode("utf-8", "surrogatepass")).digest()
        parts[int.from_bytes(digest[:8], "big") < ratio * 2**64].append(example)
    return parts


class Overlap(NamedTuple):
    """A pair of a training row and an evaluation row with the same prompt, or nearly the same."""

    train_id: str
    evaluation_id: str
    similarity: float
    """Jaccard index of the two prompts' word triples; 1 for prompts that differ only in case and punctuation."""


def find_overlaps(train: Sequence[Example], evaluation: Sequence[Example], *, similarity: float = 0.8) -> list[Overlap]:
    """Find pairs of training and evaluation rows with (nearly) the same prompt.

    Compares the last user turns as sets of word triples: |x ∩ y| / |x ∪ y| ≥ `similarity`. Two sets that are so similar
    share one of the rarest |x| - ⌈similarity·|x|⌉ + 1 triples of each, so it is enough to index those: the search is
    exact, and common phrases (a task's instruction) cost nothing.

    Args:
        train: the training rows.
        evaluation: the evaluation rows.
        similarity: the threshold, above 0 and at most 1; 1 finds equal prompts only.
    """
    left, right = ([word_triples(split_words(e.prompt[-1].content)) for e in rows] for rows in (train, evaluation))
    return [
        Overlap(train[one].id, evaluation[other].id, score)
        for one, other, score in _similar_pairs(left, right, similarity)
    ]


def _similar_pairs(
    left: Sequence[frozenset[str]], right: Sequence[frozenset[str]], similarity: float
) -> Iterator[tuple[int, int, float]]:
    """Yield the indices and the Jaccard index of similar sets, in order of the right one; see `find_overlaps`."""
    frequency = Counter(triple for triples in (*left, *right) for triple in triples)

    def rarest(triples: frozenset[str]) -> list[str]:
        ordered = sorted(triples, key=lambda triple: (frequency[triple], triple))
        # The tolerance keeps 0.8 · 5 = 4.000000000000001 from becoming 5.
        return ordered[: len(ordered) - math.ceil(similarity * len(ordered) - 1e-9) + 1]

    index: defaultdict[str, list[int]] = defaultdict(list)
    for position, triples in enumerate(left):
        for triple in rarest(triples):
            index[triple].append(position)
    for number, triples in enumerate(right):
        for position in sorted({p for triple in rarest(triples) for p in index.get(triple, ())}):
            other = left[position]
            shared = len(triples & other)
            score = shared / (len(triples) + len(other) - shared)
            if score >= similarity - 1e-9:
                yield position, number, score


def _words(text: str) -> list[str]:
    """Return the words by which a row is held out: they never change, so that a row stays where it is."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return re.findall(r"\w+", text) or [text.strip()]
