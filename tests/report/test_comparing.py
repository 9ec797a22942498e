"""Differences: corrected for multiple testing, on their own scale, and for one seed compared by prompt."""

import pytest
from scipy.stats import ttest_1samp

from stayaligned.core.records import Metric, Outcome
from stayaligned.evaluation.metrics import holm, mcnemar
from stayaligned.evaluation.results import Evidence
from stayaligned.report import build_report
from stayaligned.report.page import html_text
from stayaligned.report.prose import markdown_text
from stayaligned.report.tables import csv_text
from support.reports import arm_of


def rows(hits, n=120, judge="keyword"):
    return [
        Evidence(
            prompt_set="harmful",
            id=str(i),
            prompt=f"{i:016x}",
            outcomes={judge: Outcome.HARM if i < hits else Outcome.REFUSE},
        )
        for i in range(n)
    ]


def test_p_values_are_students_and_corrected_over_the_whole_table(grid_results):
    report = build_report(grid_results, title="t", reference="SFT attacked")
    raw = {}
    for arm in report.arms:
        for name, difference in arm.differences.items():
            values = [d for _, d in difference.paired.pairs]
            if difference.p_value is not None:
                raw[arm.name, name] = float(ttest_1samp(values, 0.0).pvalue)
    corrected = dict(zip(raw, holm(list(raw.values())), strict=True))
    assert len(raw) > 10
    for (name, metric), wanted in corrected.items():
        difference = arm_of(report, name).differences[metric]
        assert difference.p_value == pytest.approx(wanted, rel=1e-6, abs=1e-12)
        assert difference.resolved == (wanted < 0.05)
    assert 0 < sum(p < 0.05 for p in raw.values()) > sum(p < 0.05 for p in corrected.values())


def test_one_seed_is_compared_by_prompt_and_without_evidence_not_at_all(make_result):
    results = [make_result(arm, 0, harm, 0.9) for arm, harm in (("a", 0.5), ("b", 0.2))]
    judge = results[0].judges[0].judge
    evidence = {result.id: rows(hits, judge=judge) for result, hits in zip(results, (60, 24), strict=True)}
    if results[0].id == results[1].id:
        results[1] = results[1].model_copy(update={"id": "other"})
        evidence = {results[0].id: rows(60, judge=judge), "other": rows(24, judge=judge)}
    found = arm_of(build_report(results, title="t", reference="a", evidence=evidence), "b").differences["harmful_score"]
    truth = mcnemar({str(i): i < 24 for i in range(120)}, {str(i): i < 60 for i in range(120)})
    assert (found.paired.low, found.paired.high) == (truth.low, truth.high)
    assert found.resolved
    without = arm_of(build_report(results, title="t", reference="a"), "b").differences["harmful_score"]
    assert (without.resolved, without.p_value) == (False, None)


def test_a_score_on_its_own_scale_is_never_printed_as_a_percentage(make_result):
    results = []
    for seed, value in enumerate((3.1, 3.4)):
        result = make_result("a", seed, 0.5, 0.9)
        own = Metric(
            name="policy_score", value=value, scale=(1, 5), n=50, low=value - 1, high=value + 1, higher_is_better=False
        )
        reading = result.judges[0].model_copy(update={"metrics": (*result.judges[0].metrics, own)})
        results.append(result.model_copy(update={"judges": (reading, *result.judges[1:])}))
    report = build_report(results, title="t")
    estimate = report.arms[0].estimates["policy_score"]
    assert estimate.mean == pytest.approx(3.25)
    assert 1 <= estimate.low < 3.25 < estimate.high <= 5
    for text in (html_text(report), markdown_text(report)):
        assert "3.25" in text
        assert "325.0" not in text
    assert "policy_score" in csv_text(report)
