"""The benchmark of the gate's statistics measures the functions that the gate uses."""

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest

from stayaligned.evaluation.metrics import exact_interval, mean_of_prompts

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
work: Any = importlib.import_module("gate_statistics")
sys.path.pop(0)


def test_its_arrays_are_the_functions() -> None:
    work.check_own_bounds()
    low, high = work.exact_bounds(40)
    assert numpy.allclose(numpy.array([low, high]).T, [exact_interval(k, 40) for k in range(41)])
    for b, c in ((0, 0), (9, 1), (3, 14)):
        found = mean_of_prompts({0: dict(enumerate([1] * b + [-1] * c + [0] * (120 - b - c)))})
        assert work.p_above(120, numpy.array([b]), numpy.array([c]), 0.03)[0] == pytest.approx(found.p_above(0.03))


def test_newcombes_interval_is_the_published_one() -> None:
    # Newcombe 1998, table III, method 10: cells 36, 12, 2, 0.
    low, high = work.newcombe(50, *(numpy.array([x]) for x in (12, 2, 36)))
    assert (low[0], high[0]) == pytest.approx((0.0569, 0.3404), abs=1e-4)


def test_false_passes_and_false_alarms_of_the_gate_stay_below_one_in_twenty() -> None:
    rng = numpy.random.default_rng(1)
    for n, share in ((164, 0.0), (400, 0.02), (1000, 0.1)):
        first, second = work.draw_cells(rng, n, share / 2 + work.LIMIT, share / 2, 20_000)
        assert (work.own_bounds(n, first, second)[1] < work.LIMIT).mean() < 0.05
        same = work.draw_cells(rng, n, share / 2, share / 2, 20_000)
        assert (work.p_above(n, *same, work.LIMIT) <= 0.025).mean() < 0.025


def test_the_largest_share_of_false_passes_is_the_documented_one() -> None:
    assert work.passing(787, 0.01, 0.0) == pytest.approx(0.0455, abs=1e-4)
    first, second = work.draw_cells(numpy.random.default_rng(2), 400, 0.02 + work.LIMIT, 0.02, 20_000)
    drawn = (work.own_bounds(400, first, second)[1] < work.LIMIT).mean()
    assert work.passing(400, work.LIMIT, 0.02) == pytest.approx(drawn, abs=0.005)


def test_no_broken_candidate_passes() -> None:
    _, *found = work.broken(numpy.random.default_rng(3), draws=1)
    assert {(row[-2], row[-1]) for row in found} == {("100%", "0%")}, "harm alone would pass"
