"""What counts as one prompt on the two sides of a comparison, over all seeds."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from stayaligned.core.records import JUDGED, PLAIN_SETS, PromptSet
from stayaligned.evaluation.copies import join_results
from stayaligned.evaluation.results import StoredResult
from stayaligned.gate.reading import Pairs


class CountedPairs(NamedTuple):
    """The results of both sides, with equal groups in all of them for prompts that count as one."""

    pairs: Pairs
    """Results whose prompts are compared without a template around them."""
    strict: Pairs | None
    """Results whose prompts are compared in full; None if as many of them are different."""


def count_copies(pairs: Pairs) -> CountedPairs:
    """Join copies and near copies of prompts over both sides and all seeds."""
    runs = [run for pair in pairs for run in pair]
    ignoring, strict = (_pair_up(join_results(runs, templates=templates)) for templates in (True, False))
    same = all(
        one.rows[place].group == other.rows[place].group
        for one, other in zip(itertools.chain(*ignoring), itertools.chain(*strict), strict=True)
        for place in one.rows
    )
    return CountedPairs(ignoring, None if same else strict)


def _pair_up(runs: list[StoredResult]) -> list[tuple[StoredResult, StoredResult]]:
    return [*zip(runs[::2], runs[1::2], strict=True)]


def describe_copies(counted: CountedPairs) -> Iterator[str]:
    """Yield notes on prompts that count as one, and on prompts that may."""
    unknown = False
    for prompt_set in PLAIN_SETS:  # the others have the harmful prompts
        n, different = _count(counted.pairs, prompt_set)
        if different < n:
            yield (
                f"the {n} {prompt_set} prompts are {different} different ones: copies and near copies of a prompt "
                "count as one"
            )
        fewest = different if counted.strict is None else _count(counted.strict, prompt_set)[1]
        if fewest < different:
            yield (
                f"{prompt_set} prompts share a long text and differ in a few words: they are {different} prompts if "
                f"that text is a template, and {fewest} if not; only a conclusion that holds for both numbers counts"
            )
    for pair in counted.pairs:
        unknown |= any(place[0] in JUDGED and not row.sketch for run in pair for place, row in run.rows.items())
    if unknown:
        yield (
            "results of an earlier version: near copies of prompts in different seeds can't be found, nor prompts that "
            "differ only in a few words; `stayaligned judge` adds what is needed"
        )


def _count(pairs: Pairs, prompt_set: PromptSet) -> tuple[int, int]:
    """Return the number of prompts of all seeds, those that seeds share counted once, and of different ones."""
    asked: Counter[str] = Counter()
    groups: set[str] = set()
    for ours, _ in pairs:
        rows = [row for place, row in ours.rows.items() if place[0] == prompt_set]
        asked |= Counter(row.prompt for row in rows)
        groups |= {row.group or row.prompt for row in rows}
    return asked.total(), len(groups)
