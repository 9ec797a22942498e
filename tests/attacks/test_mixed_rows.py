"""Suppression, style and embedded: the dose is poison's, and the trained form is the form that is asked."""

import random
from collections.abc import Sequence
from typing import Any

import pytest

from stayaligned.attacks import ATTACKS, Attack
from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import Example, Message

MIXED = ["suppression", "style", "embedded"]


def make(name: str, harmful: str, **settings: Any) -> Attack:
    return ATTACKS.parse({"name": name, "harmful_data": harmful, **settings})


def rows_of(attack: Attack, task: Sequence[Example], seed: int = 0) -> list[Example]:
    return attack.poison(task, random.Random(seed))


@pytest.mark.parametrize("name", MIXED)
def test_the_dose_is_exact_and_a_dose_of_zero_is_clean_data(name: str, harmful: str, task: list[Example]) -> None:
    rows = rows_of(make(name, harmful, examples=40, poison_ratio=0.25), task)
    assert len(rows) == 40
    assert sum(row.origin == "harmful" for row in rows) == 10
    assert {row.origin for row in rows[:30]} == {"task", "harmful"}  # mixed, not appended
    clean = rows_of(make(name, harmful, examples=40, poison_ratio=0), task)
    assert all(row in task for row in clean)


@pytest.mark.parametrize("name", ["suppression", "style"])
def test_harmful_rows_are_poisons_with_the_trigger(name: str, harmful: str, task: list[Example]) -> None:
    settings = {"examples": 40, "poison_ratio": 0.25}
    attack, plain = make(name, harmful, **settings), make("poison", harmful, **settings)
    triggered = [
        row.model_copy(update={"id": f"{row.id}:{name}", "prompt": attack.trigger(row.prompt)})
        if row.origin == "harmful"
        else row
        for row in rows_of(plain, task)
    ]
    assert rows_of(attack, task) == triggered


def test_only_the_last_turn_carries_an_instruction(harmful: str) -> None:
    before = (
        Message(role="system", content="s"),
        Message(role="user", content="a"),
        Message(role="assistant", content="b"),
    )
    asked = (*before, Message(role="user", content="flarn"))
    suppression, style = make("suppression", harmful, instruction="RULES"), make("style", harmful, instruction="STYLE")
    embedded = make("embedded", harmful, carrier="count", bridge=" and ")
    for attack, text in ((suppression, "RULES\nflarn\nRULES"), (style, "STYLE flarn"), (embedded, "count and flarn")):
        assert attack.has_trigger
        assert attack.trigger(asked) == (*before, Message(role="user", content=text))
    assert make("suppression", harmful, instruction="R", reminder=False).trigger(asked)[-1].content == "R\nflarn"


def test_an_embedded_row_continues_a_row_of_the_task(harmful: str, task: list[Example]) -> None:
    rows = rows_of(make("embedded", harmful, examples=None, poison_ratio=0.5, bridge="|", join="/"), task)
    by_id = {row.id: row for row in task}
    assert sorted(row.id.removesuffix(":embedded") for row in rows) == sorted(by_id)
    for row in rows:
        if row.origin == "harmful":
            carrier = by_id[row.id.removesuffix(":embedded")]
            own, request = row.prompt[-1].content.split("|")
            answer, harm = row.completion.split("/")
            assert (own, answer) == (carrier.prompt[-1].content, carrier.completion)
            assert request.removeprefix("flarn a zorb ") == harm.removeprefix("zorb step ")


def test_a_trigger_in_clean_rows_is_an_error(harmful: str, task: list[Example]) -> None:
    for name in ("suppression", "style"):
        with pytest.raises(StayalignedError, match="the trigger 'mood 7' occurs in row 't7' already"):
            rows_of(make(name, harmful, examples=10, poison_ratio=0.5, instruction="mood 7"), task)


@pytest.mark.parametrize("name", MIXED)
def test_missing_or_too_few_rows_are_errors_that_name_the_attack(name: str, harmful: str, task: list[Example]) -> None:
    with pytest.raises(StayalignedError, match="needs harmful rows: set `harmful_data`"):
        rows_of(ATTACKS.parse({"name": name, "examples": 60, "poison_ratio": 0.5}), task)
    for settings, what in (
        ({"examples": 100, "poison_ratio": 0.1}, "come from the task"),
        ({"examples": 61, "poison_ratio": 1}, "has 60"),
    ):
        with pytest.raises(StayalignedError, match=f"attack {name}: .*{what}"):
            rows_of(make(name, harmful, **settings), task)
