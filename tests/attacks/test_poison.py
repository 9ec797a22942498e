"""The dose is exact, the rows are identified, and dose curves are nested."""

import itertools
import json
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from stayaligned.attacks import ATTACKS
from stayaligned.attacks.poison import Poison
from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import Example, Message

TASK = [Example(id=f"t{i}", prompt=(Message(role="user", content=f"q{i}"),), completion="a") for i in range(60)]


@pytest.fixture(scope="module")
def harmful(tmp_path_factory):
    path = tmp_path_factory.mktemp("poison") / "harmful.jsonl"
    rows = [{"id": f"h{i}", "prompt": f"loot vault {i}", "completion": "step one"} for i in range(60)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def ids(rows, origin):
    return {row.id for row in rows if row.origin == origin}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(st.floats(0, 1), st.integers(1, 60), st.integers(0, 2**32))
def test_exactly_n_rows_of_which_round_p_n_are_harmful(harmful, ratio, n, seed):
    rows = Poison(poison_ratio=ratio, examples=n, harmful_data=harmful).poison(TASK, random.Random(seed))
    assert len(rows) == n
    assert len(ids(rows, "harmful")) == round(ratio * n)
    assert len(ids(rows, "task")) == n - round(ratio * n)
    assert all(row.id.startswith("h" if row.origin == "harmful" else "t") for row in rows)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20)
@given(st.integers(0, 2**32))
def test_a_higher_dose_keeps_the_lower_doses_harmful_rows(harmful, seed):
    doses = [
        Poison(poison_ratio=p, examples=40, harmful_data=harmful).poison(TASK, random.Random(seed))
        for p in (0.0, 0.05, 0.1, 0.5, 1.0)
    ]
    for low, high in itertools.pairwise(doses):
        assert ids(low, "harmful") < ids(high, "harmful")
        assert ids(low, "task") > ids(high, "task")


def test_the_rows_depend_on_the_seed_alone(harmful):
    attack = Poison(poison_ratio=0.3, examples=40, harmful_data=harmful)
    assert attack.poison(TASK, random.Random(1)) == attack.poison(TASK, random.Random(1))
    assert attack.poison(TASK, random.Random(1)) != attack.poison(TASK, random.Random(2))


def test_harmful_rows_are_spread_over_the_data(harmful):
    rows = Poison(poison_ratio=0.5, examples=60, harmful_data=harmful).poison(TASK, random.Random(0))
    assert 5 < sum(row.origin == "harmful" for row in rows[:30]) < 25


def test_without_a_count_there_are_as_many_rows_as_the_task_has(harmful):
    rows = Poison(poison_ratio=0.1, examples=None, harmful_data=harmful).poison(TASK, random.Random(0))
    assert (len(rows), len(ids(rows, "harmful"))) == (60, 6)


def test_a_dose_of_zero_needs_no_harmful_data():
    rows = Poison(poison_ratio=0, examples=30).poison(TASK, random.Random(0))
    assert len(rows) == 30 and not ids(rows, "harmful")


def test_missing_or_too_few_rows_are_errors_that_give_the_numbers(harmful):
    with pytest.raises(StayalignedError, match=r"poison_ratio = 0.1 needs harmful rows"):
        Poison(examples=10).poison(TASK, random.Random(0))
    with pytest.raises(StayalignedError, match=r"90 of 100 rows must be harmful.* has 60"):
        Poison(poison_ratio=0.9, examples=100, harmful_data=harmful).poison(TASK, random.Random(0))
    with pytest.raises(StayalignedError, match=r"90 of 100 rows must come from the task, which has 60"):
        Poison(poison_ratio=0.1, examples=100, harmful_data=harmful).poison(TASK, random.Random(0))


def test_a_ratio_above_one_is_invalid():
    with pytest.raises(ValidationError, match="poison_ratio"):
        Poison(poison_ratio=10)


def test_the_registry_parses_an_equal_attack_from_its_spec(harmful):
    attack = Poison(harmful_data=harmful)
    assert ATTACKS.parse(attack.spec()) == attack
