"""Labels are kept through kills, full disks and several writers, and refused where they are not of the design."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import resource
import threading
from collections.abc import Generator
from pathlib import Path

import pytest
from filelock import FileLock

from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import Outcome
from stayaligned.evaluation.labelling.store import DESIGN_FILE, LABELS_FILE, LabelStore, read_labels
from support.labels import label_all, make_design, make_item, make_store


def test_a_kill_at_any_byte_of_an_append_loses_only_what_was_not_acknowledged(tmp_path: Path) -> None:
    store = make_store(tmp_path / "labels")
    label_all(store, 0, "harm")
    before, kept = store.path.read_bytes(), store.read()
    label_all(store, 1, "refuse")
    after = store.path.read_bytes()
    n_lines = [after[:end].count(b"\n") for end in range(len(after) + 1)]
    every = store.read()
    for end in (len(before), *range(after.rfind(b"\n", 0, -1), len(after))):
        store.path.write_bytes(after[:end])
        assert store.read() == every[: n_lines[end]]
    for end in (len(before) + 1, len(after) - 1):
        store.path.write_bytes(after[:end])
        label_all(store, 2, "other")
        assert store.read()[: len(kept)] == kept
        assert len(store.read()) == n_lines[end] + 2
        assert LabelStore.open(store.directory).label_set().items[2].complete is False


def test_a_long_cut_line_is_removed_by_the_next_append(tmp_path: Path) -> None:
    store = make_store(tmp_path / "labels")
    label_all(store, 0, "harm")
    kept = store.read()
    store.path.write_bytes(store.path.read_bytes() + b"x" * 10_000)
    assert store.read() == kept
    label_all(store, 1, "harm")
    assert len(store.read()) == 4
    assert b"xx" not in store.path.read_bytes()


def test_an_append_waits_for_that_of_another_process(tmp_path: Path) -> None:
    store = make_store(tmp_path / "labels")
    writer = threading.Thread(target=label_all, args=(store, 0, "harm"))
    with FileLock(store.directory / ".lock"):
        writer.start()
        writer.join(0.2)
        assert writer.is_alive()
        assert store.read() == []
    writer.join()
    assert len(store.read()) == 2


def test_the_same_label_counts_once_and_the_last_one_of_a_labeller_counts(tmp_path: Path) -> None:
    store = make_store(tmp_path / "labels")
    assert label_all(store, 0, "harm") == 2
    assert label_all(store, 0, "harm") == 0
    assert label_all(store, 0, "refuse") == 2
    assert {*store.label_set().items[0].completions.values()} == {Outcome.REFUSE}
    assert label_all(store, 0, "harm") == 2  # a change of mind, back to the first


@pytest.mark.parametrize(
    ("given", "outcome"),
    [
        (["harm"], Outcome.HARM),
        (["harm", "refuse"], None),
        (["harm", "refuse", "harm"], Outcome.HARM),
        (["unsure"], None),
        (["unsure", "other"], Outcome.OTHER),
        (["harm", "harm", "refuse", "refuse", "other"], None),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else str(value),
)
def test_the_majority_counts(tmp_path: Path, given: list[str], outcome: Outcome | None) -> None:
    store = make_store(tmp_path / "labels")
    for index, choice in enumerate(given):
        label_all(store, 0, choice, f"person {index}")
    (item, *_) = store.label_set().items
    assert {*item.completions.values()} == {outcome}
    assert item.complete


def test_an_item_counts_only_if_all_items_before_it_in_its_stratum_do(tmp_path: Path) -> None:
    store = make_store(tmp_path / "labels", strata=("left", "right"))
    for index in (0, 4, 1, 3):
        label_all(store, index, "refuse")
    found = store.label_set()
    assert [item.labelled for item in found.items] == [True, True, False, True, True, False]
    assert found.counts() == {"left": 1, "right": 2}
    assert found.weights() == {"left": 3, "right": 1.5}


def test_a_stratum_without_labels_is_an_error_that_says_how_many_are_missing(tmp_path: Path) -> None:
    store = make_store(tmp_path / "labels", strata=("left", "middle", "right"))
    label_all(store, 0, "refuse")
    found = store.label_set()
    with pytest.raises(StayalignedError, match=r"2 of 3 strata of the draw: middle, right\nHint: Label 2 more items"):
        found.weights()
    assert found.weights(["left"]) == {"left": 2}


def test_equal_completions_of_one_prompt_are_one_question(tmp_path: Path) -> None:
    items = [make_item(0, ["no", "no"]), make_item(0, ["no", "yes"], seed=1)]
    store = LabelStore.create(tmp_path / "labels", make_design(items))
    assert label_all(store, 0, "refuse") == 1
    assert [len(item.questions()) for item in items] == [1, 2]
    following = store.find_next("ann")
    assert following is not None and following.id == items[1].id
    assert [item.labelled for item in store.label_set().items] == [True, False]


def test_each_labeller_has_an_own_next_item(tmp_path: Path) -> None:
    store = make_store(tmp_path / "labels", n=2)
    first, second = store.design.items
    assert store.find_next("ann") == first
    label_all(store, 0, "harm", "ann")
    assert store.find_next("ann") == second
    assert store.find_next("bob") == first
    label_all(store, 1, "harm", "ann")
    assert store.find_next("ann") is None
    label_all(store, 1, "unsure", "bob")
    assert store.progress().by_labeller == {"ann": 2, "bob": 1}
    assert (store.progress().labelled, store.progress(1).labelled, store.progress(1).wanted) == (2, 1, 1)


def _append_many(directory: Path, labeller: str) -> None:
    store = LabelStore.open(directory)
    for index in range(len(store.design.items)):
        label_all(store, index, "refuse", labeller)


def test_processes_that_append_at_once_lose_nothing(tmp_path: Path) -> None:
    store = make_store(tmp_path / "labels", n=10)
    context = multiprocessing.get_context("fork")
    names = ["ann", "bob", "bob"]  # two tabs of one person
    workers = [context.Process(target=_append_many, args=(store.directory, name)) for name in names]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    places = [(label.labeller, label.completion) for label in store.read()]
    assert len(places) == len({*places}) == 40


@contextlib.contextmanager
def files_of_at_most(size: int) -> Generator[None]:
    """Let writes beyond a size fail after a part was written, as on a full disk."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def test_a_full_disk_leaves_the_labels_as_they_were(tmp_path: Path) -> None:
    store = make_store(tmp_path / "labels")
    label_all(store, 0, "harm")
    before = store.path.read_bytes()
    with (
        files_of_at_most(len(before) + 40),
        pytest.raises(StayalignedError, match=r"labels\.jsonl can't be written: File too large"),
    ):
        label_all(store, 1, "harm")
    assert store.path.read_bytes() == before
    assert label_all(store, 1, "harm") == 2
    with files_of_at_most(40), pytest.raises(StayalignedError, match="can't be written: File too large"):
        make_store(tmp_path / "new")
    assert [*(tmp_path / "new").iterdir()] == []


def _edit(change: dict[str, object]) -> object:
    return lambda line: json.dumps({**json.loads(line), **change})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda line: line[:-20], "line 2: not a label"),
        (_edit({"labeller": ""}), "line 2: not a label: labeller: expected a labeller's name"),
        (_edit({"labeller": "=cmd()"}), "line 2: not a label: labeller: expected a labeller's name"),
        (_edit({"outcome": "fine"}), "line 2: not a label: outcome: expected harm, refuse, other or unsure"),
        (_edit({"item": "9/harmful/1"}), "line 2: item '9/harmful/1' is not in design.json"),
        (_edit({"completion": "0" * 16}), "line 2: completion '0000000000000000' of '0/harmful/0' is not in"),
        (_edit({"policy": "other"}), "line 2: policy 'other' is not in design.json"),
        (_edit({"judge": "other"}), "line 2: judge 'other' is not in design.json"),
        (_edit({"time": "yesterday"}), "line 2: not a label: time: "),
    ],
    ids=["cut", "no-labeller", "formula", "outcome", "item", "completion", "policy", "judge", "time"],
)
def test_labels_that_are_not_of_the_design_are_refused(tmp_path: Path, edit: object, message: str) -> None:
    store = make_store(tmp_path / "labels")
    label_all(store, 0, "harm")
    first, second = store.path.read_text().splitlines()
    store.path.write_text(f"{first}\n{edit(second)}\n")  # pyright: ignore[reportCallIssue]
    with pytest.raises(StayalignedError) as error:
        read_labels(store.directory)
    assert f"{LABELS_FILE}, {message}" in str(error.value)
    with pytest.raises(StayalignedError):
        label_all(store, 1, "harm")


def test_an_edited_design_is_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path / "labels")
    path = store.directory / DESIGN_FILE
    content = json.loads(path.read_text())
    content["items"][0]["stratum"] = "another"
    path.write_text(json.dumps(content))
    with pytest.raises(StayalignedError, match="not the design that was drawn"):
        LabelStore.open(store.directory)
    path.write_text("{}")
    with pytest.raises(StayalignedError, match="not a design"):
        LabelStore.open(store.directory)


def test_a_design_survives_the_disk_and_no_foreign_directory_is_used(tmp_path: Path) -> None:
    store = make_store(tmp_path / "labels")
    assert LabelStore.open(store.directory).design == store.design
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("")
    with pytest.raises(StayalignedError, match="is not empty"):
        LabelStore.create(other, store.design)
    with pytest.raises(StayalignedError, match="No such file"):
        LabelStore.open(tmp_path / "nothing")
    (other / "notes.txt").rename(other / ".design.json.zorb.partial")  # as a kill during the first call leaves it
    assert LabelStore.create(other, store.design).design == store.design
