"""The user's own rows: splits, categories, metrics."""

import json

import pytest
from pydantic import ValidationError

from stayaligned.core.errors import StayalignedError
from stayaligned.data.tasks.jsonl import JsonLines
from support.tasks import completion


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    content = [{"prompt": f"q{i}", "completion": str(i), "category": "odd" if i % 2 else "even"} for i in range(100)]
    path.write_text("\n".join(map(json.dumps, content)))
    return path


def test_without_a_test_source_the_splits_part_the_rows(rows):
    task = JsonLines(train=str(rows), held_out_ratio=0.3)
    train, test = task.load("train"), task.load("test")
    assert len(train) + len(test) == 100
    assert not {e.id for e in train} & {e.id for e in test}
    assert 15 < len(test) < 45


def test_with_a_test_source_all_rows_are_trained_on(rows):
    task = JsonLines(train=str(rows), test=str(rows))
    assert len(task.load("train")) == len(task.load("test")) == 100


def test_a_task_that_is_only_measured_needs_no_training_rows(rows):
    task = JsonLines(test=str(rows))
    assert len(task.load("test")) == 100
    with pytest.raises(StayalignedError, match="no training rows"):
        task.load("train")
    with pytest.raises(ValidationError, match="set `train`, `test` or both"):
        JsonLines()


def test_categories_filter_and_name_what_there_is(rows):
    assert {e.category for e in JsonLines(test=str(rows), categories=("odd",)).load("test")} == {"odd"}
    with pytest.raises(StayalignedError, match=r"one of the categories prime") as caught:
        JsonLines(test=str(rows), categories=("prime",)).load("test")
    assert "even, odd" in str(caught.value)


@pytest.mark.parametrize(("ratio", "empty"), [(1e-9, "test"), (1 - 1e-9, "train")])
def test_a_split_that_would_be_empty_is_refused(rows, ratio, empty):
    with pytest.raises(StayalignedError, match=f"of 100 rows, held_out_ratio = {ratio:g} leaves none to {empty}"):
        JsonLines(train=str(rows), held_out_ratio=ratio).load(empty)


@pytest.mark.parametrize(
    ("metric", "text", "reference", "score"),
    [
        ("exact", " Yes ", "yes", 1),
        ("exact", "yes it is", "yes", 0),
        ("exact", "", "yes", 0),
        ("exact", "yes", " ", None),
        ("contains", "well, YES it is", "yes", 1),
        ("contains", "no", "yes", 0),
        ("contains", "yes", "", None),
        ("number", "it is 4.0", "4", 1),
        ("number", "none", "4", 0),
        ("number", "4", "none", None),
        ("none", "4", "4", None),
    ],
)
def test_metrics(metric, text, reference, score):
    assert JsonLines(test="x", metric=metric).score(completion(text, reference)) == score


def test_rows_without_answers_can_be_test_rows_only_where_nothing_is_scored(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}')
    assert len(JsonLines(test=str(path), metric="none").load("test")) == 1
    with pytest.raises(StayalignedError, match="no completion to learn"):
        JsonLines(test=str(path)).load("test")
