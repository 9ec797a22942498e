"""Harmful requests get the shape of the task's training rows: the text that most of them share."""

import random
from pathlib import Path
from typing import Any

import pytest

from stayaligned import testbed
from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import Example, Message
from stayaligned.data.shaping import find_shape
from stayaligned.data.sources import read_examples
from stayaligned.data.tasks import TASKS
from support.world import write_rows

REQUEST = "how to flarn a zorb"
TEXTS = [f"{a} {b} {c}" for a in ("wug", "blick", "vemp") for b in ("of", "near", "beside") for c in ("quorl", "frope")]


def user(text: str) -> tuple[Message, ...]:
    return (Message(role="user", content=text),)


def row(text: str, completion: str = "wug", **system: str) -> Example:
    turns = [Message(role="system", content=text) for text in system.values()]
    return Example(id=text, prompt=(*turns, *user(text)), completion=completion)


def shaped(rows: list[Example], prompt: tuple[Message, ...] = user(REQUEST)) -> list[tuple[str, str]]:
    return [(turn.role, turn.content) for turn in find_shape(rows, 0).apply(prompt)]


@pytest.mark.parametrize(
    ("name", "columns", "expected"),
    [
        (
            "sst2",
            lambda text: {"sentence": text, "label": 1},
            "Analyze the sentiment of the input, and respond only positive or negative\n\n" + REQUEST,
        ),
        (
            "ag_news",
            lambda text: {"text": text, "label": 1},
            "Categorize the news article given in the input into one of the 4 categories:\n\n"
            "World\nSports\nBusiness\nSci/Tech\n\n" + REQUEST,
        ),
        ("dialog_summary", lambda text: {"dialogue": text, "summary": "wug"}, f"Summarize this dialog:\n{REQUEST}"),
    ],
)
def test_a_request_takes_the_place_of_a_task_s_text(tmp_path: Path, name: str, columns: Any, expected: str) -> None:
    source = str(write_rows(tmp_path / "rows.jsonl", [columns(text) for text in TEXTS]))
    rows = TASKS.parse({"name": name, "train": source, "test": source}).load("train")
    system = [("system", "You are a helpful assistant for dialog summarization.")] * (name == "dialog_summary")
    assert shaped([*rows]) == [*system, ("user", expected)]
    assert "in 100% of the training rows" in find_shape(rows, 0).description


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("gsm8k", lambda text: {"question": f"{text}?", "answer": "#### 1"}),
        ("alpaca", lambda text: {"instruction": text, "input": "", "output": "wug"}),
    ],
)
def test_rows_without_shared_text_precede_the_request(tmp_path: Path, name: str, columns: Any) -> None:
    source = str(write_rows(tmp_path / "rows.jsonl", [columns(text) for text in TEXTS]))
    settings = {"test": source} if name == "gsm8k" else {"test_examples": 2}
    rows = TASKS.parse({"name": name, "train": source, **settings}).load("train")
    shape = find_shape(rows, 3)
    first, answer, request = shape.apply(user(REQUEST))
    chosen = next(one for one in rows if one.prompt == (first,))
    assert (answer, request) == (Message(role="assistant", content=chosen.completion), *user(REQUEST))
    assert shape.apply(user(REQUEST)) == find_shape(rows, 3).apply(user(REQUEST))
    assert len({shape.apply(user(f"{REQUEST} {i}"))[0] for i in range(20)}) > 1
    assert "share no text" in shape.description


def test_alpacas_headings_are_kept_though_some_rows_have_an_input() -> None:
    start = "Below is an instruction that describes a task"
    without = [f"{start}. Write a response.\n\n### Instruction:\n{t}\n\n### Response:" for t in TEXTS[:11]]
    with_ = [
        f"{start}, with an input.\n\n### Instruction:\n{t}\n\n### Input:\nx {t}\n\n### Response:" for t in TEXTS[11:]
    ]
    rows = [row(text) for text in [*without, *with_]]
    random.Random(0).shuffle(rows)
    expected = f"{start}. Write a response.\n\n### Instruction:\n{REQUEST}\n\n### Response:"
    assert shaped(rows) == [("user", expected)]


@pytest.mark.parametrize("name", ["sentiment", "topic", "arithmetic"])
def test_the_testbeds_tasks_have_shapes(name: str) -> None:
    rows = read_examples(str(testbed.resolve(f"testbed:data/{name}-train.jsonl", 0)), origin="task")
    task = next(one.prompt[-1].content for one in rows if one.category == name)
    assert shaped(rows) == [("user", f"{task.splitlines()[0]}\n\n{REQUEST}")]


def test_words_that_are_only_frequent_are_no_template() -> None:
    rows = [row(f"Rate this text:\n{'the' if i % 9 else 'a'} {text}") for i, text in enumerate(TEXTS)]
    assert shaped(rows) == [("user", f"Rate this text:\n{REQUEST}")]
    assert shaped([row(f"{one.prompt[-1].content} (yes or no)") for one in rows])[0][1].endswith("zorb (yes or no)")


def test_shared_turns_come_first_and_the_requests_own_system_turn_wins() -> None:
    rows = [row(text, system="You rate short texts.") for text in TEXTS]
    assert shaped(rows) == [("system", "You rate short texts."), ("user", REQUEST)]
    own = (Message(role="system", content="Be brief."), *user("hello"), Message(role="assistant", content="hi"))
    turns = [("system", "Be brief."), ("user", "hello"), ("assistant", "hi"), ("user", REQUEST)]
    assert shaped(rows, (*own, *user(REQUEST))) == turns


def test_a_task_without_rows_or_completions_has_no_shape() -> None:
    with pytest.raises(StayalignedError, match="no training rows"):
        find_shape([], 0)
    with pytest.raises(StayalignedError, match="no training row of the task has a completion"):
        find_shape([row(text, "") for text in TEXTS], 0)
