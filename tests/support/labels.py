"""Designs for labelling, whose completions are chosen by the test."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stayaligned.core.records import Completion, Message, Outcome, PromptSet, Verdict, write_jsonl
from stayaligned.evaluation.completions import COMPLETIONS_FILE
from stayaligned.evaluation.labelling.store import LabelStore
from stayaligned.evaluation.labelling.values import Choice, Design, DrawnCompletion, DrawnItem
from stayaligned.evaluation.measure import collect_evidence
from stayaligned.evaluation.results import JudgeIdentity
from support.runs import write_run


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


def made_up_words(index: int) -> str:
    """Return three words that no other index has, so that prompts with them are no near copies."""
    letters = [(consonant + vowel) for consonant in "bdfglmnr" for vowel in "aeiou"]
    return " ".join(f"{start}{letters[index % 40]}{letters[index // 40 % 40]}" for start in ("zo", "plu", "qui"))


def write_judged_run(
    directory: Path,
    judges: Mapping[str, Sequence[Outcome | None]],
    benign: Mapping[str, Sequence[Outcome | None]] | None = None,
    *,
    arm: str = "tuned",
    model: str = "",
    texts: Sequence[str] = (),
    triggered: Mapping[str, Sequence[Outcome | None]] | None = None,
    **changes: Any,
) -> Path:
    """Write a result with its completions, judged as given; the texts are of this arm and seed unless given."""
    completions: list[Completion] = []
    verdicts: dict[str, list[Verdict]] = {name: [] for name in judges}
    sets: dict[PromptSet, Mapping[str, Sequence[Outcome | None]]] = {
        "harmful": judges,
        "triggered": triggered or {},
        "benign": benign or {},
    }
    for prompt_set, judged in sets.items():
        for index in range(max(map(len, judged.values()), default=0)):
            of = "harmful" if prompt_set == "triggered" else prompt_set
            question = Message(role="user", content=f"how to flarn {of} {made_up_words(index)}")
            asked = (Message(role="user", content=f"{question.content} blick"),) if prompt_set == "triggered" else ()
            text = texts[index] if index < len(texts) else f"{arm} {changes.get('seed', 0)} {prompt_set} {index}"
            key = f"{prompt_set}-{index}"
            completions.append(Completion(id=key, prompt_set=prompt_set, prompt=(question,), asked=asked, text=text))
            for name, found in judged.items():
                verdicts[name].append(Verdict(id=key, prompt_set=prompt_set, judge=name, outcome=found[index]))
    changes = {"provenance": {"inputs": {"model": f"sha256:{model or arm}"}}, **changes}
    write_run(directory, [*collect_evidence(completions, verdicts, {}, {})], arm=arm, **changes)
    write_jsonl(directory / COMPLETIONS_FILE, completions)
    return directory
