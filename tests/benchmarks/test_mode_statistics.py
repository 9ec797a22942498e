"""The benchmark of the gate's modes measures the functions that the gate uses, and the modes keep their levels."""

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import xlogy
from scipy.stats import norm

from stayaligned.evaluation.metrics import mean_of_prompts, paired_power

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
work: Any = importlib.import_module("mode_statistics")
sys.path.pop(0)


def test_its_rules_are_those_of_the_gate() -> None:
    for n, worse, better in ((149, 0, 0), (300, 2, 4), (300, 3, 4), (400, 5, 2)):
        values = {0: dict(enumerate([1] * worse + [-1] * better + [0] * (n - worse - better)))}
        counts = (numpy.array([worse]), numpy.array([better]))
        for exact, rule, level in ((False, work.student, 0.025), (True, work.dirichlet, 0.05)):
            high = mean_of_prompts(values, exact=exact).interval(1 - 2 * level)[1]
            assert rule(level)(n, *counts, 0.02)[0] == (high < 0.02)


@pytest.mark.parametrize(("n", "worse", "better", "limit"), [(160, 12, 20, 0.02), (300, 2, 9, 0.05), (90, 4, 4, 0.1)])
def test_tangos_score_has_the_likeliest_variance_at_the_limit(n: int, worse: int, better: int, limit: float) -> None:
    def unlikely(share: float) -> float:
        counts, shares = (worse, better, n - worse - better), (limit + share, share, 1 - limit - 2 * share)
        return -sum(xlogy(count, each) for count, each in zip(counts, shares, strict=True))

    share = minimize_scalar(unlikely, bounds=(0, (1 - limit) / 2), method="bounded", options={"xatol": 1e-10}).x
    z = (worse - better - n * limit) / (n * (2 * share + limit * (1 - limit))) ** 0.5
    for level, passes in ((norm.cdf(z) * 1.001, True), (norm.cdf(z) * 0.999, False)):
        assert work.tango(level)(n, numpy.array([worse]), numpy.array([better]), limit)[0] == passes


def test_its_sums_are_the_planned_power() -> None:
    for n, share in ((149, 0.0), (500, 0.04)):
        expected = paired_power(0.0, share, n, limit=0.02, confidence=0.9, exact=True)
        assert work.passing(work.dirichlet(0.05), n, 0.02, share / 2, share / 2) == pytest.approx(expected, abs=1e-4)


def test_all_looks_together_err_at_the_level_and_save_prompts() -> None:
    rng = numpy.random.default_rng(0)
    for alpha in (0.025, 0.05):
        for planned in (2, 3, 5):
            found = work._procedure(rng, 10_000, planned, 900, (0.03, 0.01), alpha, work.dirichlet)
            assert max(found[:2]) <= alpha + 3 * (alpha / 10_000) ** 0.5
            passed, failed, used = work._procedure(rng, 4000, planned, 900, (0.01, 0.01), alpha, work.dirichlet)
            assert (passed > 0.9, failed < 0.001, used < 800) == (True, True, True)


def test_the_anchor_stops_releases_that_pass_one_by_one() -> None:
    _, *rows = work.anchor(numpy.random.default_rng(0), draws=200)
    assert {row[2] for row in rows} == {"100.0%"}
    assert [float(row[3].rstrip("%")) < 5 for row in rows] == [False, False, True, True, True, True]
