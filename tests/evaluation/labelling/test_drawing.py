"""The draw has known probabilities: each first part is a random sample of each stratum, and every item can be drawn."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import Outcome
from stayaligned.evaluation.completions import COMPLETIONS_FILE
from stayaligned.evaluation.labelling.drawing import draw, read_frame
from support.labels import write_judged_run
from support.runs import H, R, S, outcomes

O = Outcome.OTHER  # noqa: E741


def two_arms(root: Path, n: int = 40, **changes: Any) -> list[Path]:
    """Return a run of each arm: the first has harm on 4 prompts, the second on 10, two of which are the same."""
    return [
        write_judged_run(root / "a", {"keyword": outcomes(n, 4)}, {"keyword": outcomes(n, 0)}, arm="before", **changes),
        write_judged_run(
            root / "b", {"keyword": outcomes(n, 10, 2)}, {"keyword": [R, *outcomes(n - 1, 0)]}, arm="after", **changes
        ),
    ]


def test_a_frame_has_each_prompt_of_each_seed_with_all_arms(tmp_path: Path) -> None:
    runs = [*two_arms(tmp_path / "0", 3), *two_arms(tmp_path / "1", 3, seed=1)]
    frame = read_frame(runs)
    assert frame.arms == ("before", "after")
    assert [item.id for item in frame.items][:4] == [
        "0/harmful/harmful-0",
        "0/harmful/harmful-1",
        "0/harmful/harmful-2",
        "0/benign/benign-0",
    ]
    assert len(frame.items) == 12
    assert [one.text for one in frame.items[-1].completions] == ["before 1 benign 2", "after 1 benign 2"]
    assert frame.outcomes["0/harmful/harmful-2", "after"] == {"keyword": H}
    assert read_frame([*reversed(runs)]).hash == frame.hash
    assert read_frame(runs, ["after"]).arms == ("after",)


def test_strata_tell_verdicts_of_each_arm_and_whether_judges_differ(tmp_path: Path) -> None:
    judges = {"keyword": [H, H, R, R, None], "guard": [H, S, S, H, S]}
    other = {"keyword": [R, H, R, R, R], "guard": [S, H, S, S, S]}
    runs = [
        write_judged_run(tmp_path / "a", judges, {"keyword": [R, O], "guard": [S, S]}, arm="a"),
        write_judged_run(tmp_path / "b", other, {"keyword": [O, O], "guard": [S, S]}, arm="b"),
    ]
    strata = {item.id: item.stratum for item in draw(read_frame(runs), wanted=5).items}
    assert [strata[f"0/harmful/harmful-{index}"] for index in range(5)] == [
        "harmful: harm / no harm",
        "harmful: harm / harm; judges differ",
        "harmful: no harm / no harm",
        "harmful: no harm / no harm; judges differ",
        "harmful: unscored / no harm",
    ]
    assert [strata[f"0/benign/benign-{index}"] for index in range(2)] == [
        "benign: refusal / no refusal",
        "benign: no refusal / no refusal",
    ]
    by_guard = draw(read_frame(runs), wanted=5, judge="guard")
    assert by_guard.judge_name == "guard"
    assert by_guard.judge is not None and by_guard.judge.name == "guard"
    third = write_judged_run(tmp_path / "c", other, {"keyword": [R, R], "guard": [S, S]}, arm="c")
    strata = {item.id: item.stratum for item in draw(read_frame([*runs, third]), wanted=5).items}
    assert strata["0/harmful/harmful-0"] == "harmful: some harm"
    assert strata["0/harmful/harmful-4"] == "harmful: no harm, some unscored"


def test_the_order_depends_on_the_seed_alone_and_has_every_item_once(tmp_path: Path) -> None:
    frame = read_frame(two_arms(tmp_path))
    drawn = draw(frame, wanted=30, seed=3)
    assert drawn == draw(frame, wanted=30, seed=3)
    assert drawn.items != draw(frame, wanted=30, seed=4).items
    assert sorted(item.id for item in drawn.items) == sorted(item.id for item in frame.items)
    assert drawn.strata == Counter(item.stratum for item in drawn.items)
    assert drawn.frame_hash == frame.hash


def test_each_item_of_a_stratum_is_equally_likely_in_each_first_part(tmp_path: Path) -> None:
    frame = read_frame(two_arms(tmp_path, 12))
    positions = np.zeros((400, 24))
    for seed in range(400):
        drawn = draw(frame, wanted=10, seed=seed)
        place = {item.id: index for index, item in enumerate(drawn.items)}
        positions[seed] = [place[item.id] for item in frame.items]
    by_id = {item.id: item.stratum for item in draw(frame, wanted=10).items}
    strata = np.array([by_id[item.id] for item in frame.items])
    for cut in (5, 10, 18):
        drawn_often = (positions < cut).sum(0)
        for stratum in {*strata}:
            own = drawn_often[strata == stratum]
            if len(own) > 1 and 0 < own.sum() < 400 * len(own):
                assert stats.chisquare(own).pvalue > 1e-4


def test_a_first_part_has_each_stratum_and_more_of_what_is_bad(tmp_path: Path) -> None:
    drawn = draw(read_frame(two_arms(tmp_path, 200)), wanted=100)
    first = Counter(item.stratum for item in drawn.items[: len(drawn.strata)])
    assert first == dict.fromkeys(drawn.strata, 1)
    counts = Counter(item.stratum for item in drawn.items[:100])
    assert all(counts[stratum] >= min(size, 4) for stratum, size in drawn.strata.items())
    shares = {stratum: counts[stratum] / size for stratum, size in drawn.strata.items()}
    assert shares["harmful: no harm / harm"] > 1.8 * shares["harmful: no harm / no harm"]


def test_arms_with_one_result_each_may_have_other_seeds(tmp_path: Path) -> None:
    runs = [
        write_judged_run(tmp_path / "a", {"keyword": [H, R]}, arm="a", seed=3),
        write_judged_run(tmp_path / "b", {"keyword": [R, R]}, arm="b", seed=1),
    ]
    assert {item.seed for item in read_frame(runs).items} == {1}


def test_a_judge_that_is_added_later_is_no_other_frame(tmp_path: Path) -> None:
    one = write_judged_run(tmp_path / "a", {"keyword": [H, R]})
    again = write_judged_run(tmp_path / "b", {"guard": [S, S], "keyword": [H, R]})
    assert read_frame([one]).hash == read_frame([again]).hash
    other = write_judged_run(tmp_path / "c", {"keyword": [H, R]}, model="another")
    assert read_frame([one]).hash != read_frame([other]).hash
    text = write_judged_run(tmp_path / "d", {"keyword": [H, R]}, texts=["changed"])
    assert read_frame([one]).hash != read_frame([text]).hash


def test_runs_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    one = write_judged_run(tmp_path / "a", {"keyword": [H, R]}, arm="a")
    longer = write_judged_run(tmp_path / "b", {"keyword": [H, R, R]}, arm="b")
    with pytest.raises(StayalignedError, match=r"1 prompts are not the same: only one of them has 'harmful-2'"):
        read_frame([one, longer])
    guard = write_judged_run(tmp_path / "c", {"guard": [H, R]}, arm="c")
    with pytest.raises(StayalignedError, match="no judge is common to all runs"):
        read_frame([one, guard])
    strict = {"judges": [{"name": "keyword", "strict": True}]}
    other = write_judged_run(tmp_path / "d", {"keyword": [H, R]}, arm="d", experiment=strict)
    with pytest.raises(StayalignedError, match="differ in judge 'keyword': setting 'strict'"):
        read_frame([one, other])
    seeds = [write_judged_run(tmp_path / f"e{seed}", {"keyword": [H, R]}, arm="e", seed=seed) for seed in (0, 1)]
    with pytest.raises(StayalignedError, match="seed 1: arm 'a' has no result"):
        read_frame([one, *seeds])
    with pytest.raises(StayalignedError, match="seed 0 appears twice"):
        read_frame([one, one])
    with pytest.raises(StayalignedError, match=r"--arm 'b': no such arm(.|\n)*Arms: a"):
        read_frame([one], ["b"])
    with pytest.raises(StayalignedError, match="--judge 'guard': no such judge"):
        draw(read_frame([one]), wanted=1, judge="guard")


def test_edited_completions_are_refused(tmp_path: Path) -> None:
    run = write_judged_run(tmp_path / "a", {"keyword": [H, R]})
    path = run / COMPLETIONS_FILE
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0]["text"] = "another text"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(StayalignedError, match="not the completions that"):
        read_frame([run])
    path.unlink()
    with pytest.raises(StayalignedError, match=r"completions\.jsonl: No such file"):
        read_frame([run])
