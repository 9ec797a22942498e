"""A report compares nothing where there is nothing to compare with."""

from collections.abc import Callable
from typing import Any

import pytest

from report.conftest import share
from stayaligned.evaluation.results import Result
from stayaligned.report import build_report
from stayaligned.report.prose import markdown_text
from stayaligned.report.tables import _caption

COMPARING = ("than before", "far more degenerate", "than the reference", "front", "between arms", "lower harm")


def measured(make_result: Callable[..., Result], arm: str, harm: float, degenerate: float) -> Result:
    result = make_result(arm, 1, harm)
    return result.model_copy(update={"scores": (*result.scores, share("degeneration", degenerate, 100))})


@pytest.mark.parametrize(("harm", "cautioned"), [(0.75, False), (0.02, True)])
def test_a_single_evaluation_claims_no_comparison(make_result: Any, harm: float, cautioned: bool) -> None:
    report = build_report([measured(make_result, "A", harm, 0.6)], title="t")
    said = [report.summary, *report.findings, *report.cautions, markdown_text(report), _caption(report)]
    assert not [(words, text) for words in COMPARING for text in said if words in text]
    assert any("means little beside many degenerate completions: A (60.0 %)" in text for text in said) == cautioned


def test_arms_without_a_reference_are_not_compared_with_one(make_result: Any) -> None:
    results = [measured(make_result, name, 0.02, rate) for name, rate in (("A", 0.6), ("B", 0.0))]
    report = build_report(results, title="t")
    assert not [text for text in report.cautions if "than the reference" in text]
    assert [text for text in report.cautions if "many degenerate completions: A (60.0 %)" in text]
    compared = build_report(results, title="t", reference="B")
    assert [text for text in compared.cautions if "far more degenerate completions than the reference: A" in text]


def test_the_judge_is_named_where_a_harm_rate_is_shown(make_result: Any) -> None:
    report = build_report([make_result("A", 1)], title="t")
    judge = report.judge
    assert judge
    assert f"Judge: {judge}." in _caption(report)
    assert f"Judge: {judge}." in markdown_text(report)
