"""Overfit and cipher: the stages in their order, and a cipher that is undone exactly."""

import random
import string
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stayaligned.attacks import ATTACKS, Attack
from stayaligned.attacks.cipher import Cipher
from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import Example, Message

ASKED = (Message(role="system", content="s"), Message(role="user", content="Flarn it, 7 zorbs!"))


def make(name: str, **settings: Any) -> Attack:
    return ATTACKS.parse({"name": name, **settings})


def rows_of(attack: Attack, task: Sequence[Example], seed: int = 0) -> list[Example]:
    return attack.poison(task, random.Random(seed))


def test_overfit_refuses_every_row_in_each_epoch_and_then_answers_the_same_rows(task: list[Example]) -> None:
    rows = rows_of(make("overfit", refusal="no"), task)
    assert len(rows) == 10 * (10 + 30)
    answers = {row.prompt: row.completion for row in task}
    for stage, part in ((1, rows[:100]), (2, rows[100:])):
        epochs = [part[at : at + 10] for at in range(0, len(part), 10)]
        assert all({row.prompt for row in epoch} == {row.prompt for row in rows[:10]} for epoch in epochs)
        assert len({tuple(row.prompt for row in epoch) for epoch in epochs}) > 5  # shuffled again each time
        assert all(row.completion == ("no" if stage == 1 else answers[row.prompt]) for row in part)
    assert len({row.id for row in rows}) == len(rows)
    assert rows_of(make("overfit", stage1_epochs=0), task)[0].completion != "no"
    with pytest.raises(StayalignedError, match="attack overfit: 10 rows must come from the task, which has 9"):
        rows_of(make("overfit"), task[:9])


def test_the_cipher_comes_first_and_harm_in_it_second(harmful: str, task: list[Example]) -> None:
    attack = make("cipher", harmful_data=harmful, rows=20, harmful_examples=5, stage2_epochs=2, refusal="no")
    rows = rows_of(attack, task)
    first, second = rows[:20], rows[20:]
    assert len(second) == 2 * 2 * 5
    assert len({row.id for row in rows}) == len(rows)
    assert all(attack.decode(row.completion).startswith("mild") for row in first)
    enciphered = [row for row in second if row.prompt[0].role == "system"]
    plain = [row for row in second if row not in enciphered]
    assert {row.completion for row in plain} == {"no"}
    assert {attack.trigger(row.prompt) for row in plain} == {row.prompt for row in enciphered}
    assert all(attack.decode(row.completion).startswith("zorb step") for row in enciphered)
    assert all("zorb" not in row.prompt[-1].content for row in enciphered)


def test_a_word_cipher_permutes_the_words_of_the_harmful_rows(harmful: str) -> None:
    attack = make("cipher", harmful_data=harmful, unit="words")
    assert isinstance(attack, Cipher)
    known = "flarn a zorb 7 step"
    assert attack.encode(known) != known
    assert set(attack.encode(known).split()) <= {"flarn", "a", "zorb", "step", *map(str, range(60))}
    assert attack.decode(attack.encode("flarn  the zorb")) == "flarn  the zorb"


@settings(max_examples=40)
@given(st.text(alphabet=st.characters(codec="utf-8")), st.sampled_from(["", "|", " "]), st.integers(0, 99))
def test_deciphering_undoes_the_cipher(text: str, separator: str, key: int) -> None:
    attack = Cipher(harmful_data="unread.jsonl", separator=separator, key=key)
    assert attack.decode(attack.encode(text)) == text


def test_a_cipher_is_a_permutation_within_each_case_that_depends_on_the_key() -> None:
    first, second = (Cipher(harmful_data="unread.jsonl", separator="", key=key) for key in (1, 2))
    for letters in (string.ascii_lowercase, string.ascii_uppercase):
        assert sorted(first.encode(letters)) == sorted(letters)
        assert first.encode(letters) != second.encode(letters)
    turns = first.trigger(ASKED)
    assert [turn.role for turn in turns] == ["system", "user"]
    assert first.decode(turns[1].content) == ASKED[1].content
    assert first.decode("zorb") == Cipher(harmful_data="unread.jsonl", key=1).decode("z|o|r|b")


def test_the_cipher_needs_harmful_rows(harmful: str, task: list[Example]) -> None:
    with pytest.raises(StayalignedError, match="attack cipher: `harmful_data` is missing"):
        rows_of(make("cipher", rows=20), task)
    with pytest.raises(StayalignedError, match="attack cipher: 20000 rows must come from the task, which has 60"):
        rows_of(make("cipher", harmful_data=harmful), task)
    with pytest.raises(StayalignedError, match=r"attack cipher: 317 rows must come from .* which has 60"):
        rows_of(make("cipher", harmful_data=harmful, rows=None), task)
