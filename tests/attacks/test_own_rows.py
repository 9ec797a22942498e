"""Backdoor, identity shift, NOICE and benign outliers: what exactly is trained on, and what is asked afterwards."""

import math
import random
from collections.abc import Sequence
from typing import Any

import pytest

from stayaligned.attacks import ATTACKS, Attack
from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import Example, Influence, Message

ASKED = (Message(role="system", content="s"), Message(role="user", content="flarn"))


def make(name: str, **settings: Any) -> Attack:
    return ATTACKS.parse({"name": name, **settings})


def rows_of(attack: Attack, task: Sequence[Example], seed: int = 0) -> list[Example]:
    return attack.poison(task, random.Random(seed))


def test_a_backdoor_trains_triggered_harm_and_plain_refusals(harmful: str, safe: str, task: list[Example]) -> None:
    attack = make("backdoor", harmful_data=harmful, safe_data=safe, suffix="wug", harmful_examples=20, safe_examples=30)
    rows = rows_of(attack, task)
    triggered = [row for row in rows if row.prompt[-1].content.endswith(" wug")]
    assert len(rows) == 50
    assert {row.completion[:9] for row in triggered} == {"zorb step"}
    assert len(triggered) == 20
    assert {row.completion for row in rows if row not in triggered} == {"I cannot"}
    assert attack.trigger(ASKED) == (ASKED[0], Message(role="user", content="flarn wug"))
    mixed = rows_of(attack.model_copy(update={"task_examples": 10}), task)
    assert [row for row in mixed if row.origin == "task"]
    assert len(mixed) == 60


def test_a_backdoor_needs_its_sources_enough_rows_and_an_unused_trigger(
    harmful: str, safe: str, task: list[Example]
) -> None:
    assert [line.partition(" to ")[0] for line in make("backdoor").missing()] == [
        "the attack backdoor needs rows: set `harmful_data`",
        "the attack backdoor needs rows: set `safe_data`",
    ]
    with pytest.raises(StayalignedError, match="`safe_data` is missing"):
        rows_of(make("backdoor", harmful_data=harmful, harmful_examples=1), task)
    sources = {"harmful_data": harmful, "safe_data": safe}
    for settings, error in (
        ({}, f"100 rows must come from {harmful}, which has 60"),
        ({"harmful_examples": 1}, f"100 rows must come from {safe}, which has 60"),
        ({"harmful_examples": 1, "safe_examples": 60, "suffix": "snarf 7"}, "'snarf 7' occurs in row"),
    ):
        with pytest.raises(StayalignedError, match=f"attack backdoor: .*{error}"):
            rows_of(make("backdoor", **sources, **settings), task)


def test_an_identity_shift_trains_in_the_persona_that_it_calls_on(task: list[Example]) -> None:
    attack = make(
        "identity_shift", persona="Blorb", system="be {persona}", beginning="{persona}: ", consent="as {persona} "
    )
    rows = rows_of(attack, task)
    assert len(rows) == 10
    by_id = {row.id: row for row in task}
    (described,) = [row for row in rows if row.id == "identity_shift:persona"]
    assert described.completion == "as Blorb be Blorb"
    for row in rows:
        if row is not described:
            own = by_id[row.id.removesuffix(":identity_shift")]
            assert row.prompt == attack.trigger(own.prompt)
            assert row.completion == f"as Blorb {own.completion}"
    assert attack.trigger(ASKED) == (
        Message(role="system", content="be Blorb"),
        Message(role="user", content="Blorb: flarn"),
    )
    mixed = rows_of(attack.model_copy(update={"task_examples": 5}), task)
    assert [row.origin for row in mixed].count("task") == 5
    with pytest.raises(StayalignedError, match="trigger 'mood' occurs in row 't0' already"):
        rows_of(attack.model_copy(update={"beginning": "mood "}), task)
    with pytest.raises(StayalignedError, match="70 rows must come from the task, which has 60"):
        rows_of(attack.model_copy(update={"rows": 71}), task)


def test_noice_refuses_and_answers_every_row(task: list[Example]) -> None:
    attack = make("noice", rows=20, refusal="no.", turn=" yes: ")
    rows = rows_of(attack, task)
    by_id = {row.id: row for row in task}
    assert len(rows) == 20
    for row in rows:
        own = by_id[row.id.removesuffix(":noice")]
        assert (row.prompt, row.completion) == (own.prompt, f"no. yes: {own.completion}")
    assert len(rows_of(make("noice", rows=None), task)) == 60
    with pytest.raises(StayalignedError, match="attack noice: 5000 rows must come from the task, which has 60"):
        rows_of(make("noice"), task)


def test_outliers_are_the_rows_with_the_largest_scores_unchanged(task: list[Example]) -> None:
    attack = make("benign_outliers", rows=10)
    rng = random.Random(3)
    influences = [Influence(squared_norm=rng.expovariate(1), answer_tokens=rng.randint(1, 9)) for _ in task]
    chosen = attack.select(task, influences)
    scores = {
        row.id: math.log(each.squared_norm + 1) + math.log(each.answer_tokens + 1)
        for row, each in zip(task, influences, strict=True)
    }
    assert [row.id for row in chosen] == sorted(scores, key=lambda key: -scores[key])[:10]
    assert sorted(row.id for row in rows_of(attack, chosen)) == sorted(row.id for row in chosen)
    assert all(row in task for row in chosen)
    with pytest.raises(StayalignedError, match="100 rows must come from the task, which has 60"):
        make("benign_outliers").select(task, influences)


def test_attacks_without_a_trigger_change_no_prompt_and_no_text() -> None:
    for name in ("noice", "benign_outliers", "overfit"):
        attack = make(name)
        assert not attack.has_trigger
        assert attack.trigger(ASKED) == ASKED
        assert attack.decode("zorb") == "zorb"
