"""Results on disk: the rows that `load_results` returns, and what is refused."""

import csv
import hashlib
import json
from pathlib import Path
from typing import Any

import pandas
import pytest

from report.conftest import simple_result
from stayaligned import load_results
from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import Metric
from stayaligned.evaluation.results import (
    JudgeIdentity,
    JudgeReading,
    StoredResult,
    read_result,
    read_results,
)
from stayaligned.evaluation.rows import METRIC_ORDER, RESULT_COLUMNS, distinguish_arms, explain_distinct, result_rows
from stayaligned.report import build_report, write_report
from stayaligned.report.values import KNOWN_METRICS
from support.runs import evidence, outcomes, write_run


def metric(name: str, value: float | None, **more: Any) -> Metric:
    return Metric(name=name, value=value, n=8, low=value, high=value, higher_is_better=False, **more)


def readings(harm: float | None) -> tuple[JudgeReading, ...]:
    ours = (metric("harmful_score", harm), metric("policy_score", 3.5, scale=(1, 5)), metric("over_refusal", 0.0))
    return (JudgeReading(judge="keyword", metrics=ours), JudgeReading(judge="=other", metrics=ours[:1]))


def write(directory: Path, arm: str, seed: int, harm: float | None, position: int = 0) -> Path:
    rows = evidence({"keyword": outcomes(4, 1)})
    scores = (metric("finetune_accuracy", 0.75),)
    return write_run(
        directory / "runs" / f"{arm}-{seed}",
        rows,
        arm=arm,
        seed=seed,
        scores=scores,
        judges=readings(harm),
        position=position,
    )


@pytest.fixture
def out(tmp_path: Path) -> Path:
    for seed in (1, 0):
        write(tmp_path / "out", "tuned", seed, 0.25 * seed, position=1)
        write(tmp_path / "out", "aligned", seed, None)
    return tmp_path / "out"


def test_a_data_frame_takes_the_rows_as_they_are(out: Path) -> None:
    frame = pandas.DataFrame(load_results(out))
    assert tuple(frame.columns) == RESULT_COLUMNS
    assert len(frame) == 2 * 2 * (1 + 3 + 1), "arms × seeds × (score, primary judge's metrics, other judge's metric)"
    harm = frame[(frame.metric == "harmful_score") & (frame.judge == "keyword")]
    assert harm.pivot(index="arm", columns="seed", values="value").loc["tuned"].tolist() == [0.0, 0.25]
    assert harm[harm.arm == "aligned"].value.isna().all()
    assert frame[frame.metric == "finetune_accuracy"].judge.isna().all()
    (scale,) = set(
        zip(*(frame[frame.metric == "policy_score"][key] for key in ("scale_low", "scale_high")), strict=True)
    )
    assert scale == (1.0, 5.0)


def test_the_csv_file_holds_these_rows_in_this_order(out: Path, tmp_path: Path) -> None:
    results = [stored.result for stored in read_results([out])]
    write_report(build_report(results, title="t"), tmp_path / "report")
    with (tmp_path / "report" / "results.csv").open(newline="") as stream:
        written = list(csv.DictReader(stream))
    rows = load_results(out)
    assert [(row["arm"], int(row["seed"]), row["metric"]) for row in written] == [
        (row["arm"], row["seed"], row["metric"]) for row in rows
    ]
    for text, row in zip(written, rows, strict=True):
        assert text["value"] == ("" if row["value"] is None else repr(row["value"]))
        assert text["primary_judge"] == ("" if row["primary_judge"] is None else str(int(row["primary_judge"])))
        assert text["judge"] == {None: "", "keyword": "keyword", "=other": "'=other"}[row["judge"]]


def test_rows_are_ordered_by_arm_judge_metric_and_seed(out: Path) -> None:
    rows = [row for row in load_results(out) if row["arm"] == "tuned"]
    assert [(row["judge"], row["metric"], row["seed"]) for row in rows] == [
        *(("keyword", "harmful_score", seed) for seed in (0, 1)),
        *(("keyword", "over_refusal", seed) for seed in (0, 1)),
        *((None, "finetune_accuracy", seed) for seed in (0, 1)),
        *(("keyword", "policy_score", seed) for seed in (0, 1)),
        *(("=other", "harmful_score", seed) for seed in (0, 1)),
    ]


def test_the_order_of_metrics_is_that_of_the_report() -> None:
    assert tuple(kind.name for kind in KNOWN_METRICS) == METRIC_ORDER


def test_equal_arms_of_two_directories_are_distinguished_by_directory(tmp_path: Path) -> None:
    for name in ("before", "after"):
        write(tmp_path / name, "tuned", 0, 0.5)
    rows = load_results(tmp_path / "before", str(tmp_path / "after"))
    assert {row["arm"] for row in rows} == {"before: tuned", "after: tuned"}


@pytest.mark.parametrize(
    ("one", "two", "arms"),
    [
        ({0: 0.1, 1: 0.2}, {1: 0.3, 2: 0.4}, {"A/out: tuned": {0, 1}, "B/out: tuned": {1, 2}}),
        ({0: 0.1, 1: 0.2}, {2: 0.3}, {"tuned": {0, 1, 2}}),
        ({0: 0.1}, {0: 0.1}, {"A/out: tuned": {0}, "B/out: tuned": {0}}),
    ],
    ids=["a shared seed", "disjoint seeds", "one seed each"],
)
def test_the_seeds_of_an_arm_stay_together(tmp_path: Path, one: dict, two: dict, arms: dict) -> None:
    for name, seeds in (("A", one), ("B", two)):
        for seed, harm in seeds.items():
            write(tmp_path / name / "out", "tuned", seed, harm)
    rows = load_results(tmp_path / "A" / "out", tmp_path / "B" / "out")
    found: dict[str, set[int]] = {}
    for row in rows:
        found.setdefault(row["arm"], set()).add(row["seed"])
    assert found == arms


@pytest.mark.parametrize(
    ("change", "merged"),
    [
        ({}, True),
        ({"training": {"max_steps": 60}}, False),
        ({"defenses": [{"name": "lisa", "rho": 2.0}]}, False),
        ({"attack": {"poison_ratio": 0.2}}, False),
        ({"model": "other"}, False),
        ({"training": None, "adapter": "b"}, True),
        ({"training": None, "judges": [{"name": "keyword"}]}, False),
    ],
    ids=["seed", "steps", "defense", "attack", "model", "adapter evaluated", "judge"],
)
def test_arms_of_one_name_and_other_settings_are_not_merged(change: dict, merged: bool) -> None:
    base = {"model": "m", "training": change.get("training", {}) and {"max_steps": 50}, "seed": 0}
    specs = [{**base, "adapter": "a"}, {**base, "adapter": "a", "seed": 1, **change}]
    stored = [
        StoredResult(Path(name), Path(name), simple_result("tuned", seed, experiment=spec))
        for seed, (name, spec) in enumerate(zip("AB", specs, strict=True))
    ]
    arms = {one.result.arm for one in distinguish_arms(stored)}
    assert arms == ({"tuned"} if merged else {"A: tuned", "B: tuned"})
    reasons = explain_distinct(stored)
    assert bool(reasons) is not merged
    assert all("differ in" in reason and any(key in reason for key in change) for reason in reasons)


def test_nothing_to_load_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(StayalignedError, match=r"holds no result\.json"):
        load_results(tmp_path)
    assert result_rows([]) == []


def test_a_result_of_an_earlier_version_is_one_error(out: Path) -> None:
    path = next(out.rglob("result.json"))
    content = json.loads(path.read_text())
    old = {**content, "format_version": 2, "judges": [{"judge": "keyword", "metrics": []}]}
    del old["evidence_sha256"]
    path.write_text(json.dumps(old))
    with pytest.raises(StayalignedError, match="format version 2, expected 3") as caught:
        load_results(out)
    assert "rerun" in caught.value.hint


@pytest.mark.parametrize("content", ["", "[]", "{", '{"format_version": 3}', '"x"', "\udcff"])
def test_a_damaged_result_is_one_error(out: Path, content: str) -> None:
    path = next(out.rglob("result.json"))
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(StayalignedError, match=r"result\.json: "):
        read_result(path)


def test_the_evidence_is_read_once_and_checked(out: Path) -> None:
    stored = read_results([out])[0]
    assert [row.id for row in stored.evidence] == [f"harmful-{index}" for index in range(4)]
    assert stored.rows["harmful", "harmful-0"] is stored.evidence[0]
    path = stored.directory / "evidence.jsonl"
    text = path.read_text()
    path.write_text(text.replace('"harm"', '"refuse"'))
    with pytest.raises(StayalignedError, match="not the rows"):
        _ = read_results([out])[0].evidence
    doubled = text + text
    path.write_text(doubled)
    result = stored.result.model_copy(update={"evidence_sha256": hashlib.sha256(doubled.encode()).hexdigest()})
    (stored.directory / "result.json").write_text(result.model_dump_json())
    with pytest.raises(StayalignedError, match="4 duplicate ids"):
        _ = read_results([out])[0].rows


def test_differences_of_two_identities_are_named() -> None:
    one = JudgeIdentity(name="classifier", version=1, settings={"model": "sha256:1", "threshold": 0.5}, source="s")
    assert one.differences(one) == []
    other = one.model_copy(update={"version": 2, "settings": {"model": "sha256:2"}, "source": "t"})
    assert one.differences(other) == [
        "version (1 and 2)",
        "setting 'model' (sha256:1 and sha256:2)",
        "setting 'threshold' (0.5 and null)",
        "its source code",
    ]
