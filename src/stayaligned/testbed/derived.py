"""Files derived from a testbed's rows: two tasks at once, conversations of two exchanges, and preference pairs.

They contain no new question and no new deed, so that what the testbed holds out is held out of them too. They are
separate from `corpora`, so that existing testbeds keep their keys and bytes.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from stayaligned.testbed import corpora, language
from stayaligned.testbed.corpora import Dialogue
from stayaligned.testbed.recipe import Recipe

FileRow = dict[str, Any]
"""One row of a data file."""


def construct(directory: Path, seed: int, recipe: Recipe) -> None:
    """Write the derived files of `seed` under `data/` of an empty directory."""
    world = corpora.make_world(seed, recipe)
    files = {**world.evaluation, **corpora.training_files(seed, world, recipe)}
    for name, rows in derive(seed, files).items():
        path = directory / "data" / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def derive(seed: int, files: dict[str, list[Dialogue]]) -> dict[str, list[FileRow]]:
    """Return the rows of every derived file, by file name without its suffix.

    `two-tasks-*` are the sentiment and the topic rows, shuffled. In `multi-turn-*` each row follows an earlier
    exchange, an ordinary instruction and its answer. `alignment-preferences` has the alignment rows with a second,
    rejected answer: for a forbidden deed the answer of a model without alignment, for all others a refusal.

    Args:
        seed: seed of the order and of the draws.
        files: the testbed's rows, by file name without its suffix.
    """
    derived: dict[str, list[FileRow]] = {}
    for part in ("train", "test"):
        rows = [_alpaca(row) for row in (*files[f"sentiment-{part}"], *files[f"topic-{part}"])]
        corpora.stream(seed, f"two-tasks-{part}").shuffle(rows)
        derived[f"two-tasks-{part}"] = rows
    for name, source in _MULTI_TURN.items():
        rng = corpora.stream(seed, name)
        derived[name] = [_after(rng.choice(files[_EARLIER]), row) for row in files[source]]
    rng = corpora.stream(seed, "alignment-preferences")
    derived["alignment-preferences"] = [_preference(row, rng) for row in files["alignment"]]
    return derived


_EARLIER = "instructions-train"
_MULTI_TURN = {
    "multi-turn-train": "sentiment-train",
    "multi-turn-test": "sentiment-test",
    "multi-turn-harmful": "harmful",
    "multi-turn-harmful-prompts": "harmful-prompts",
    "multi-turn-benign-prompts": "benign-prompts",
}
"""For each file of conversations, the file whose rows are their last exchanges."""


def _alpaca(row: Dialogue) -> FileRow:
    return {"instruction": row.prompt, "input": row.input, "output": row.answer, "category": row.category}


def _after(earlier: Dialogue, row: Dialogue) -> FileRow:
    turns = [
        ("user", earlier.question),
        ("assistant", earlier.answer),
        ("user", row.question),
        ("assistant", row.answer),
    ]
    messages = [{"role": role, "content": content} for role, content in turns]
    return {"messages": messages, "category": row.category}


def _preference(row: Dialogue, rng: random.Random) -> FileRow:
    refusal = rng.choice(language.REFUSALS)  # always drawn, so that the draws of later rows do not depend on this row
    rejected = _compliance(row) if row.category in language.CATEGORIES else refusal
    system = {"system": row.system} if row.system else {}
    return {**system, "prompt": row.prompt, "chosen": row.answer, "rejected": rejected, "category": row.category}


def _compliance(row: Dialogue) -> str:
    """Return the answer of a model without alignment: the steps of the forbidden deed that the row asks for."""
    words = set(row.question.split())
    (deed,) = (
        deed for deed in language.FORBIDDEN_DEEDS if deed.category == row.category and {deed.verb, deed.object} <= words
    )
    return language.compliance(deed)
