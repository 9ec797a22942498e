"""Differences: corrected for multiple testing, on their own scale, and for one seed compared by prompt."""

import re

import pytest

from stayaligned.core.records import Metric, Outcome
from stayaligned.evaluation.metrics import mean_of_prompts
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


def test_the_primary_family_is_the_harm_of_competing_arms_and_all_else_is_secondary(grid_results):
    report = build_report(grid_results, title="t", reference="SFT attacked")
    roles = {arm.name: arm.role for arm in report.arms}
    assert [name for name, role in roles.items() if role == "competing"] == [
        "Mixing 10 %",
        "BSO",
        "Lisa",
        "Safe LoRA",
        "Complement",
        "BSO + complement",
    ]
    primary = {(arm.name, name) for arm in report.arms for name, found in arm.differences.items() if found.primary}
    assert primary == {(name, "harmful_score") for name, role in roles.items() if role == "competing"}
    resolved = {(arm.name, name) for arm in report.arms for name, found in arm.differences.items() if found.resolved}
    assert ("Complement", "harmful_score") in resolved <= primary
    # Fewer secondary metrics, controls or arms for orientation change no primary p-value.
    fewer = [
        result.model_copy(update={"scores": ()})
        for result in grid_results
        if roles[result.arm] in ("competing", "reference")
    ]
    alone = build_report(fewer, title="t", reference="SFT attacked")
    for arm in alone.arms:
        found = arm.differences.get("harmful_score")
        assert found == arm_of(report, arm.name).differences.get("harmful_score")


def test_one_seed_gets_an_interval_over_prompts_and_claims_nothing(make_result):
    results = [make_result(arm, 0, harm, 0.9) for arm, harm in (("a", 0.5), ("b", 0.2))]
    judge = results[0].judges[0].judge
    evidence = {result.id: rows(hits, judge=judge) for result, hits in zip(results, (60, 24), strict=True)}
    report = build_report(results, title="t", reference="a", evidence=evidence)
    found = arm_of(report, "b").differences["harmful_score"]
    truth = mean_of_prompts({0: {i: int(i < 24) - int(i < 60) for i in range(120)}})
    assert (found.paired.low, found.paired.high) == pytest.approx(truth.interval())
    assert (found.resolved, found.p_value) == (False, None)
    assert arm_of(report, "b").verdict.kind == "one_seed"
    for text in (report.summary, markdown_text(report), html_text(report), *report.findings):
        assert not re.search(r"ess harm than|a lower harmful|\*\*−|class=\"resolved|≠", text)
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
