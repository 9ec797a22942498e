"""Designs for labelling, whose completions are chosen by the test."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from stayaligned.core.records import Message
from stayaligned.evaluation.labelling.store import LabelStore
from stayaligned.evaluation.labelling.values import Choice, Design, DrawnCompletion, DrawnItem
from stayaligned.evaluation.results import JudgeIdentity


def short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def make_item(index: int, texts: Sequence[str], stratum: str = "all", seed: int = 0) -> DrawnItem:
    """Return an item with one completion for each arm."""
    question = f"how to flarn zorb {index}"
    return DrawnItem(
        id=f"{seed}/harmful/{index}",
        seed=seed,
        prompt_set="harmful",
        prompt=short_hash(question),
        stratum=stratum,
        messages=(Message(role="user", content=question),),
        completions=tuple(
            DrawnCompletion(arm=f"arm {arm}", completion=short_hash(text), policy=f"policy {arm}", text=text)
            for arm, text in enumerate(texts)
        ),
    )


def make_design(items: Sequence[DrawnItem]) -> Design:
    """Return a design of these items in this order."""
    strata = [item.stratum for item in items]
    return Design(
        seed=0,
        wanted=len(items),
        judge=JudgeIdentity(name="keyword", version=1, source="source"),
        judge_name="keyword",
        arms=tuple(f"arm {index}" for index in range(len(items[0].completions))),
        strata={stratum: strata.count(stratum) for stratum in dict.fromkeys(strata)},
        items=tuple(items),
    )


def make_store(directory: Path, n: int = 6, strata: Sequence[str] = ("all",)) -> LabelStore:
    """Create a labelling of two arms, whose items take the strata in turn."""
    items = [make_item(index, [f"before {index}", f"after {index}"], strata[index % len(strata)]) for index in range(n)]
    return LabelStore.create(directory, make_design(items))


def label_all(store: LabelStore, index: int, outcome: Choice, labeller: str = "ann") -> int:
    """Give one outcome to each completion of the item at `index` in the order of the draw."""
    item = store.design.items[index]
    return store.append([store.label(item.id, key[2], outcome, labeller) for key in item.questions()])
