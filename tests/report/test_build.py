"""build_report: what is aggregated, in which order, and what it says."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from stayaligned.errors import StayalignedError
from stayaligned.records import Metric
from stayaligned.report import build_report
from stayaligned.report.build import _estimate
from stayaligned.results import JudgeReading, Result

shares = st.floats(0, 1)


def metric(value: float | None, *, n: int = 100, name: str = "harmful_score", n_unscored: int = 0) -> Metric:
    bounds = {} if value is None else {"low": max(0, value - 0.1), "high": min(1, value + 0.1)}
    return Metric(name=name, value=value, n=0 if value is None else n, n_unscored=n_unscored, higher_is_better=False,
                  **bounds)  # fmt: skip


def reading(*metrics: Metric) -> tuple[JudgeReading, ...]:
    return (JudgeReading(judge="j", metrics=metrics),)


@given(st.lists(shares, min_size=2, max_size=6))
def test_a_mean_over_seeds_carries_students_interval_cut_to_0_and_1(values: list[float]) -> None:
    estimate = _estimate([(seed, metric(value)) for seed, value in enumerate(values)], "j")
    low, high = fmean(values), fmean(values)
    if stats.sem(values) > 0:
        low, high = stats.t.interval(0.95, len(values) - 1, loc=fmean(values), scale=stats.sem(values))
    assert estimate.mean == pytest.approx(fmean(values))
    assert estimate.interval == "seeds"
    assert (estimate.low, estimate.high) == (
        pytest.approx(max(0, low), abs=1e-9),
        pytest.approx(min(1, high), abs=1e-9),
    )


@given(st.lists(st.none() | shares, min_size=1, max_size=5))
def test_a_seed_without_a_score_enters_no_mean_and_is_counted(values: list[float | None]) -> None:
    rows = [(seed, metric(value, n_unscored=7 if value is None else 0)) for seed, value in enumerate(values)]
    estimate = _estimate(rows, "j")
    scored = [value for value in values if value is not None]
    assert estimate.mean == (pytest.approx(fmean(scored)) if scored else None)
    assert estimate.n == 100 * len(scored)
    assert estimate.n_unscored == 7 * values.count(None)
    if not scored:
        assert (estimate.low, estimate.high, estimate.interval) == (None, None, "none")


def test_a_single_seed_keeps_the_interval_of_its_prompts(make_result) -> None:
    result = make_result(judges=reading(metric(0.5)))
    estimate = build_report([result], title="t").arms[0].estimates["harmful_score"]
    assert (estimate.low, estimate.high, estimate.interval) == (0.4, 0.6, "prompts")


def test_arms_come_in_order_of_first_appearance_and_seeds_in_order(make_result) -> None:
    results = [make_result("b", 2), make_result("a", 1), make_result("b", 1)]
    report = build_report(results, title="t")
    assert [(arm.name, arm.seeds) for arm in report.arms] == [("b", (1, 2)), ("a", (1,))]
    assert report.n_results == 3


def test_differences_are_paired_by_seed_whatever_their_order(make_result) -> None:
    rates = {("r", 1): 0.9, ("r", 2): 0.5, ("a", 2): 0.4, ("a", 1): 0.7, ("a", 3): 0.1}
    results = [make_result(arm, seed, judges=reading(metric(rate))) for (arm, seed), rate in rates.items()]
    report = build_report(results, title="t", reference="r")
    assert report.arms[0].differences == {}
    difference = report.arms[1].differences["harmful_score"]
    assert difference.pairs == ((1, pytest.approx(-0.2)), (2, pytest.approx(-0.1)))
    assert (difference.n_lower, difference.unpaired) == (2, (3,))


def test_a_single_seed_never_counts_as_a_resolved_difference(make_result) -> None:
    results = [make_result(arm, judges=reading(metric(rate))) for arm, rate in (("r", 1.0), ("a", 0.0))]
    report = build_report(results, title="t", reference="r")
    assert "none of 1 other arm lowered" in report.answer
    assert any("single seed" in caution for caution in report.cautions)


def test_the_answer_counts_what_left_its_interval(comparison: Sequence[Result]) -> None:
    report = build_report(comparison, title="t", reference="SFT attacked")
    assert report.answer.startswith("Against SFT attacked, 6 of 9 other arms lowered the harmful score")
    assert "Random" not in report.findings[0]
    assert any("Drop" in finding and "accuracy fell" in finding for finding in report.findings)
    assert not any("tamper" in text for text in (report.answer, *report.findings))


def test_landmarks_stay_out_of_the_front_and_the_count(comparison: Sequence[Result]) -> None:
    arms = {arm.name: arm for arm in build_report(comparison, title="t", reference="SFT attacked").arms}
    assert {name for name, arm in arms.items() if not arm.comparable} == {"Base", "Aligned untouched", "SFT clean"}
    assert not any(arms[name].on_front for name in ("Base", "Aligned untouched", "SFT clean"))


@given(st.lists(st.tuples(shares, shares), min_size=1, max_size=8))
def test_an_arm_is_on_the_front_exactly_if_none_beats_it(points: list[tuple[float, float]]) -> None:
    from stayaligned.report.build import _front

    estimates = {
        str(index): {
            "harmful_score": _estimate([(0, metric(harm))], "j"),
            "finetune_accuracy": _estimate([(0, metric(accuracy, name="finetune_accuracy"))], ""),
        }
        for index, (harm, accuracy) in enumerate(points)
    }
    beaten = {
        str(i)
        for i, (harm, accuracy) in enumerate(points)
        for h, a in points
        if h <= harm and a >= accuracy and (h < harm or a > accuracy)
    }
    assert _front(estimates) == set(estimates) - beaten


def test_arms_that_patch_one_adapter_share_its_training(comparison: Sequence[Result]) -> None:
    trainings = build_report(comparison, title="t").trainings
    assert ("SFT attacked", "Safe LoRA", "Complement", "Drop", "Shrink", "Random") in [t.arms for t in trainings]
    lisa = next(t for t in trainings if t.arms == ("Lisa",))
    assert [curve.quantity for curve in lisa.curves] == ["loss", "alignment_loss", "finetuning_loss", "drift"]


def test_rows_of_the_log_without_a_number_are_left_out(make_result) -> None:
    log = (
        {"step": 1, "loss": 2.0},
        {"step": 2, "loss": float("nan")},
        {"step": 3},
        {"loss": 1.0},
        {"train_runtime": 9},
    )
    (training,) = build_report([make_result(training_log=log)], title="t").trainings
    assert training.curves[0].seeds == ((100, ((1.0, 2.0),)),)


def test_layers_are_averaged_over_seeds(comparison: Sequence[Result]) -> None:
    arm = next(arm for arm in build_report(comparison, title="t").arms if arm.name == "Safe LoRA")
    (patch,) = arm.patches
    layers = [layer for r in comparison if r.arm == "Safe LoRA" for layer in r.patches[0].layers]
    assert len(patch.modules) == 28
    for effect in patch.modules:
        same = [layer.similarity for layer in layers if layer.module == effect.module]
        assert effect.similarity == pytest.approx(fmean(same))
        assert (effect.n_selected, effect.n_seeds) == (3, 3)


def test_a_stage_that_results_share_is_timed_once(comparison: Sequence[Result]) -> None:
    times = {time.stage: time for time in build_report(comparison, title="t").provenance.times}
    # Seven trainings (patched arms share one) and thirteen generations, of three seeds each.
    assert (times["train"].n_computed, times["generate"].n_computed) == (7 * 3, 13 * 3)
    assert times["train"].total_seconds == pytest.approx(11.5 * 21)


def test_notes_and_disagreements_of_provenance_become_cautions(make_result) -> None:
    other = make_result("b").provenance.model_copy(update={"commit": "f" * 40})
    results = [make_result("a", notes=("3 of 9 task prompts also stand in the training data",)),
               make_result("b", provenance=other)]  # fmt: skip
    cautions = build_report(results, title="t").cautions
    assert cautions[0] == "3 of 9 task prompts also stand in the training data (a)."
    assert any("2 different code commits" in caution for caution in cautions)


def test_a_reference_without_a_result_is_said_and_not_fatal(make_result) -> None:
    report = build_report([make_result("a")], title="t", reference="gone")
    assert report.reference is None
    assert report.cautions[0].startswith("The reference arm 'gone' has no result")


def test_no_results_and_doubled_results_are_refused(make_result) -> None:
    with pytest.raises(StayalignedError, match="at least one result"):
        build_report([], title="t")
    with pytest.raises(StayalignedError, match="two results of seed 100"):
        build_report([make_result("a"), make_result("a")], title="t")


def test_importing_the_report_loads_nothing_heavy() -> None:
    code = "import sys, stayaligned.report; print({'torch', 'matplotlib', 'scipy', 'jinja2'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
