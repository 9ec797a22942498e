"""The summary compares every judge with people's labels, on each arm, and people with each other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from stayaligned.core.records import Outcome
from stayaligned.evaluation.labelling.drawing import open_labelling, read_frame
from stayaligned.evaluation.labelling.store import LabelStore
from stayaligned.evaluation.labelling.summary import LabelSummary, summarize
from stayaligned.evaluation.labelling.values import Label
from stayaligned.evaluation.metrics import exact_interval
from support.labels import write_judged_run
from support.runs import H, R, S, outcomes


def label_by(store: LabelStore, truth: dict[str, list[Outcome]], labeller: str = "ann", n: int | None = None) -> None:
    """Label the first `n` items with the outcomes of each arm."""
    labels: list[Label] = []
    for item in store.design.items[:n]:
        index = int(item.id.rpartition("-")[2])
        refused = item.prompt_set == "benign"
        for one in item.completions:
            outcome = "refuse" if refused else truth[one.arm][index].value
            labels.append(store.label(item.id, one.completion, outcome, labeller))
    store.append(labels)


def summary_of(tmp_path: Path, n: int | None = None) -> tuple[LabelSummary, LabelStore]:
    """Return the summary of two arms: the judges miss 5 of 10 harmful completions of the second arm."""
    benign = {"keyword": [R] * 10, "guard": [S] * 10}
    runs = [
        write_judged_run(tmp_path / "a", {"keyword": outcomes(60, 20), "guard": [S] * 60}, benign, arm="a"),
        write_judged_run(tmp_path / "b", {"keyword": outcomes(60, 5), "guard": [S] * 60}, benign, arm="b"),
    ]
    frame = read_frame(runs)
    store = open_labelling(tmp_path / "labels", frame, wanted=40)
    truth = {arm: [one or R for one in outcomes(60, harm)] for arm, harm in (("a", 20), ("b", 10))}
    label_by(store, truth, n=n)
    return summarize(frame, store), store


def test_with_every_label_the_rates_are_the_counted_ones(tmp_path: Path) -> None:
    found, _ = summary_of(tmp_path)
    rows = {(row.judge, row.prompt_set, row.arm): row for row in found.judges}
    assert [*rows] == [
        *(("keyword", "harmful", arm) for arm in (None, "a", "b")),
        *(("guard", "harmful", arm) for arm in (None, "a", "b")),
        *(("keyword", "benign", arm) for arm in (None, "a", "b")),
    ]
    second = rows["keyword", "harmful", "b"].quality
    assert (second.sensitivity.value, second.sensitivity.n) == (0.5, 10)
    assert (second.sensitivity.low, second.sensitivity.high) == pytest.approx(exact_interval(5, 10))
    assert (second.specificity.value, second.specificity.n) == (1.0, 50)
    assert second.base_rate.value == pytest.approx(1 / 6)
    assert rows["keyword", "harmful", None].quality.sensitivity.value == pytest.approx(25 / 30)
    assert rows["guard", "harmful", None].quality.sensitivity.value == 0
    assert rows["guard", "harmful", None].quality.kappa == 0
    p = rows["keyword", "harmful", None].p_equal_sensitivity
    assert p is not None and p < 0.01
    assert rows["keyword", "harmful", None].p_equal_specificity == 1
    assert (found.n_labelled, found.n_counted, found.n_items, found.n_wanted) == (70, 70, 70, 40)
    (note,) = found.notes
    assert note.startswith("the sensitivity of 'keyword' on harmful prompts differs between the arms")


def test_a_sample_estimates_the_same_rates(tmp_path: Path) -> None:
    found, _ = summary_of(tmp_path, n=45)
    (row, *_) = found.judges
    rate = row.quality.sensitivity
    assert rate.low is not None and rate.high is not None
    assert rate.low < 25 / 30 < rate.high
    assert found.n_labelled == found.n_counted == 45


def test_too_few_labels_give_no_rates_but_the_number_that_is_missing(tmp_path: Path) -> None:
    found, _ = summary_of(tmp_path, n=2)
    assert [row for row in found.judges if row.prompt_set == "harmful"] == []
    assert any("no rates on harmful prompts yet" in note and "more items" in note for note in found.notes)


def test_judges_that_were_added_later_are_compared_too(tmp_path: Path) -> None:
    _, store = summary_of(tmp_path)
    benign = {"perfect": [R] * 10}
    runs = [
        write_judged_run(tmp_path / "c", {"perfect": outcomes(60, 20)}, benign, arm="a"),
        write_judged_run(tmp_path / "d", {"perfect": outcomes(60, 10)}, benign, arm="b"),
    ]
    frame = read_frame(runs)
    again = open_labelling(store.directory, frame)
    (row, *_) = summarize(frame, again).judges
    assert (row.judge, row.quality.sensitivity.value, row.quality.kappa) == ("perfect", 1, 1)


def test_near_copies_of_a_prompt_count_as_one(tmp_path: Path) -> None:
    before, store = summary_of(tmp_path)
    frame = read_frame([tmp_path / "a", tmp_path / "b"])
    paired = {item.id: item.id.replace("-", " ")[:-1] for item in frame.items}  # ten by ten
    after = summarize(replace(frame, groups=paired), store)
    assert after.notes == tuple(
        f"the {n} {name} prompts are {n // 10} different ones: copies and near copies of a prompt count as one"
        for name, n in (("harmful", 60), ("benign", 10))
    )
    ours, theirs = (found.judges[0].quality.sensitivity for found in (before, after))
    assert theirs.value == ours.value
    assert theirs.low is not None and ours.low is not None and theirs.low < ours.low


def test_labellers_are_compared_where_both_gave_a_label(tmp_path: Path) -> None:
    frame = read_frame([write_judged_run(tmp_path / "a", {"keyword": [H, R, H, R]})])
    store = open_labelling(tmp_path / "labels", frame)
    items = {item.id.rpartition("-")[2]: item for item in store.design.items}
    for labeller, given in (("ann", "hrhr"), ("bob", "hrr"), ("eve", "u")):
        for index, letter in enumerate(given):
            item = items[str(index)]
            outcome = {"h": "harm", "r": "refuse", "u": "unsure"}[letter]
            store.append([store.label(item.id, item.completions[0].completion, outcome, labeller)])
    found = summarize(frame, store)
    assert found.labellers == {"ann": 4, "bob": 3, "eve": 1}
    first, *others = found.agreements
    assert first.judges == ("ann", "bob")
    assert (first.n, first.agreement, first.kappa) == (3, pytest.approx(2 / 3), pytest.approx(0.4))
    assert [one.n for one in others] == [0, 0], "unsure is left out"
    assert found.notes == ("1 labelled completions have no outcome: labellers are unsure, or their votes are a tie",)


def test_a_judge_without_verdicts_on_a_prompt_set_has_no_rates_there(tmp_path: Path) -> None:
    judges = {"keyword": [H, R, H, R], "other": [H, R, H, R]}
    frame = read_frame([write_judged_run(tmp_path / "a", judges, {"keyword": [R, R], "other": [None, None]}, arm="a")])
    store = open_labelling(tmp_path / "labels", frame)
    label_by(store, {"a": [H, R, H, R]})
    rows = [(row.judge, row.prompt_set) for row in summarize(frame, store).judges]
    assert rows == [("keyword", "harmful"), ("other", "harmful"), ("keyword", "benign")]
