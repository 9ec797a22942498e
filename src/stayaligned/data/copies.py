"""Find copies and near copies of prompts, within one set and between sets of which only sketches are known."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

from stayaligned.data.shingles import split_words, word_triples

NEAR = 0.8
"""Least Jaccard index of two prompts' word triples with which they are near copies."""
_FEWEST_IN_TEMPLATE = 10
"""Prompts that a triple must exceed to belong to a template: of few prompts, half may well be copies."""
_FEWEST_OWN_WORDS = 3
"""Words that a prompt must have beside a template: one or two more are an addition to one and the same prompt."""
_COMMON = 50
"""Number of sets from which on an element is common: sets that share only such elements are compared as classes."""
_SKETCHED = 48
"""Most triples in a sketch: prompts of up to 50 words are compared exactly."""
_DIGITS = 6


class PromptSketch(NamedTuple):
    """What identifies one prompt, and what its near copies in other runs are found by."""

    prompt: str
    """Hash of the prompt."""
    group: str
    """What the prompt counts as in its own run."""
    whole: str
    """Sketch of the whole text; empty if it is unknown."""
    own: str
    """Sketch of the text beside a template that most prompts of the run share; empty if it is the whole text."""


class PromptCopy(NamedTuple):
    """A prompt among the prompts of one set."""

    first: int
    """Index of the first prompt that it is a copy or a near copy of; its own if of none."""
    whole: str
    """As in `PromptSketch`."""
    own: str
    """As in `PromptSketch`."""


def find_copies(prompts: Sequence[str]) -> list[int]:
    """Return for each prompt the index of the first prompt that it is a copy or a near copy of (its own, if of none).

    Near copies share 80 % of their word triples (Jaccard), or are linked by prompts that do. Case, punctuation, and
    numbers beside four words or more are ignored. So are triples that more than half of the prompts share, if at least
    three words of the prompt are in no such triple: they are a template around what is asked.
    """
    return [one.first for one in compare_prompts(prompts)]


def compare_prompts(prompts: Sequence[str]) -> list[PromptCopy]:
    """Find copies and near copies as `find_copies` does, and sketch each prompt for a comparison with other runs."""
    words = [_plain_words(prompt) for prompt in prompts]
    distinct = list(dict.fromkeys(words))
    whole = [word_triples(one) for one in distinct]
    own = _remove_template(distinct, whole)
    first: dict[tuple[str, ...], int] = {}
    for index, one in enumerate(words):
        first.setdefault(one, index)
    roots = link_similar(own)
    found = {
        one: PromptCopy(first[distinct[root]], _sketch(triples), "" if triples == rest else _sketch(rest))
        for one, root, triples, rest in zip(distinct, roots, whole, own, strict=True)
    }
    return [found[one] for one in words]


def join_copies(prompts: Iterable[PromptSketch], *, templates: bool = True) -> dict[str, str]:
    """Return for the hash of each prompt of several runs what it counts as: the smallest hash among its near copies.

    Prompts of one group are one; so are prompts of one hash, and near copies by their sketches.

    Args:
        prompts: the prompts of all runs, of one prompt set.
        templates: whether a template around the prompts is ignored where they were evaluated; if not, prompts that
            differ in little beside a long template count as one.
    """
    distinct = list(dict.fromkeys(prompts))
    names = list(dict.fromkeys(name for one in distinct for name in (one.prompt, one.group or one.prompt)))
    links = _Links(len(names))
    index = {name: place for place, name in enumerate(names)}
    by_sketch: dict[str, int] = {}
    for one in distinct:
        place = index[one.prompt]
        links.link(place, index[one.group or one.prompt])
        for sketch in {one.own or one.whole} if templates else {one.own, one.whole}:
            if sketch:
                links.link(place, by_sketch.setdefault(sketch, place))
    places = list(by_sketch.values())
    for place, root in zip(places, link_similar([*map(_read_sketch, by_sketch)]), strict=True):
        links.link(place, places[root])
    members: dict[int, list[str]] = {}
    for name, place in index.items():
        members.setdefault(links.root(place), []).append(name)
    smallest = {root: min(found) for root, found in members.items()}
    return {one.prompt: smallest[links.root(index[one.prompt])] for one in distinct}


def link_similar(sets: Sequence[frozenset[str]], similarity: float = NEAR) -> list[int]:
    """Return for each set the index of the first set that it is linked to by similar sets; its own if to none.

    Exact, and fast also if thousands of sets share most of their elements. Two similar sets share one of the rarest
    |x| - ⌈similarity·|x|⌉ + 1 elements of each. If this element is rare, the pair is found by it. If not, they share
    common elements only, and their similarity follows from these and from the number of their other elements.

    Args:
        sets: the sets to compare.
        similarity: the least Jaccard index of similar sets, above 0 and at most 1.
    """
    frequency = Counter(element for one in sets for element in one)
    links = _Links(len(sets))
    rare: defaultdict[str, list[int]] = defaultdict(list)
    classes: dict[tuple[frozenset[str], int], _Class] = {}
    for index, one in enumerate(sets):
        ordered = sorted(one, key=lambda element: (frequency[element], element))
        # The tolerance keeps 0.8 · 5 = 4.000000000000001 from becoming 5.
        kept = ordered[: len(ordered) - math.ceil(similarity * len(ordered) - 1e-9) + 1]
        for other in {other for element in kept for other in rare.get(element, ())}:
            if links.root(other) != links.root(index) and _is_similar(one, sets[other], similarity):
                links.link(index, other)
        for element in kept:
            if frequency[element] <= _COMMON:
                rare[element].append(index)
        kept_common = tuple(element for element in kept if frequency[element] > _COMMON)
        if kept_common:
            common = frozenset(element for element in ordered if frequency[element] > _COMMON)
            key = common, len(ordered) - len(common)
            classes.setdefault(key, _Class(*key, kept_common, [])).members.append(index)
    _link_classes([*classes.values()], links, similarity)
    return [links.root(index) for index in range(len(sets))]


class _Class(NamedTuple):
    """Sets with the same common elements, and with as many others."""

    common: frozenset[str]
    n_others: int
    kept: tuple[str, ...]
    """Elements of which a similar set has one, if it shares only common elements."""
    members: list[int]


def _link_classes(classes: Sequence[_Class], links: _Links, similarity: float) -> None:
    """Link sets whose common elements alone make them similar."""
    holders: defaultdict[str, list[_Class]] = defaultdict(list)
    united: set[int] = set()

    def unite(one: _Class) -> None:
        if one.members[0] not in united:
            united.add(one.members[0])
            for member in one.members:
                links.link(one.members[0], member)

    def is_near(one: _Class, other: _Class) -> bool:
        shared = len(one.common & other.common)
        either = len(one.common) + len(other.common) - shared + one.n_others + other.n_others
        return shared >= similarity * either - 1e-9

    for one in classes:
        first = one.members[0]
        if len(one.members) == 1 or is_near(one, one):
            unite(one)
        for other in (other for element in one.kept for other in holders[element]):
            linked = links.root(first) == links.root(other.members[0])
            if not (linked and {first, other.members[0]} <= united) and is_near(one, other):
                unite(one)
                unite(other)
                links.link(first, other.members[0])
        for element in one.kept:
            holders[element].append(one)


class _Links:
    """Indices that are linked to each other; the smallest of those linked is their root."""

    def __init__(self, n: int) -> None:
        self._parents = list(range(n))

    def root(self, index: int) -> int:
        """Return the smallest index that an index is linked to."""
        while self._parents[index] != index:
            self._parents[index] = self._parents[self._parents[index]]
            index = self._parents[index]
        return index

    def link(self, one: int, other: int) -> None:
        """Link two indices."""
        low, high = sorted((self.root(one), self.root(other)))
        self._parents[high] = low


def _is_similar(one: frozenset[str], other: frozenset[str], similarity: float) -> bool:
    shared = len(one & other)
    return shared >= similarity * (len(one) + len(other) - shared) - 1e-9


def _plain_words(text: str) -> tuple[str, ...]:
    """Return the words without numbers, if four or more words remain."""
    words = split_words(text)
    plain = [word for word in words if not word.isdigit()]
    return tuple(plain if len(plain) >= 4 else words)


def _remove_template(prompts: Sequence[tuple[str, ...]], triples: Sequence[frozenset[str]]) -> list[frozenset[str]]:
    """Return the triples of each prompt that are in no template, or all of them if few of its words are in none."""
    least = max(_FEWEST_IN_TEMPLATE, len(prompts) / 2)
    template = {triple for triple, count in Counter(t for found in triples for t in found).items() if count > least}
    if not template:
        return [*triples]
    pairs = Counter(pair for words in prompts for pair in {*itertools.pairwise(words)})
    common = {pair for pair, count in pairs.items() if count > least}

    def count_own(words: tuple[str, ...]) -> int:
        places = (i for i, pair in enumerate(itertools.pairwise(words)) if pair in common)
        return len(words) - len({place for i in places for place in (i, i + 1)})

    return [
        found - template if count_own(words) >= _FEWEST_OWN_WORDS else found
        for words, found in zip(prompts, triples, strict=True)
    ]


def _sketch(triples: frozenset[str]) -> str:
    """Return the smallest hashes of triples: a sample that is the same in every set, for any number of prompts."""
    return "".join(sorted({_hash(triple) for triple in triples})[:_SKETCHED])


@lru_cache(maxsize=1_000_000)
def _hash(triple: str) -> str:
    return hashlib.sha256(triple.encode("utf-8", "surrogatepass")).hexdigest()[:_DIGITS]


def _read_sketch(sketch: str) -> frozenset[str]:
    return frozenset(sketch[i : i + _DIGITS] for i in range(0, len(sketch), _DIGITS))
