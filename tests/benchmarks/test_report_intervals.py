"""The intervals of the report cover what they state, and its claims are rarely wrong; the arrays are the functions."""

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
work: Any = importlib.import_module("report_intervals")
sys.path.pop(0)
DRAWS = 1500
ERROR = 3 * (0.95 * 0.05 / DRAWS) ** 0.5


def test_its_arrays_are_the_functions() -> None:
    work.check_arrays()


@pytest.mark.parametrize("kind", work.KINDS, ids=[kind.name for kind in work.KINDS])
@pytest.mark.parametrize("shared", [True, False], ids=["shared prompts", "own prompts"])
def test_the_interval_of_an_arm_covers_seeds_and_prompts(kind: Any, shared: bool) -> None:
    rng = numpy.random.default_rng(0)
    truth = work.expected(rng, kind)
    for k, n in ((2, 50), (3, 10), (3, 200), (5, 50)):
        table = work.draw(rng, kind, k, n, shared=shared, draws=DRAWS)
        assert work.held(work.crossed(table, (0, 1), shared=shared), truth) >= 0.93 - ERROR


def test_reports_of_many_arms_that_do_not_differ_rarely_claim_less_harm() -> None:
    rng = numpy.random.default_rng(0)
    for kind in (work.KINDS[2], work.KINDS[4]):
        claimed = [found[0] for found in work.false_claims(rng, kind, 12, 3, 50, 400)]
        assert numpy.mean(claimed) <= 0.05
