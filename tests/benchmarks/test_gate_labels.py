"""The benchmark of gates with labels simulates what it says, and false passes stay below one in twenty."""

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stayaligned.evaluation.metrics import mean_of_prompts

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
work: Any = importlib.import_module("gate_labels")
sys.path.pop(0)


@pytest.mark.parametrize(("labelled", "limit"), [(320, 0.02), (230, 0.02), (212, 0.05), (105, 0.1), (62, 0.1)])
def test_a_candidate_to_which_the_judge_is_blind_passes_in_less_than_one_of_twenty_cases(labelled, limit) -> None:
    assert 0 < work.blind_passes(520, labelled, limit) < 0.05


def test_labels_of_which_the_judge_tells_nothing_have_the_error_of_as_many_prompts() -> None:
    # However many prompts they were drawn from: the bound that lets a candidate pass is nearly the same.
    for found in (0, 3):
        alone = mean_of_prompts({0: dict(enumerate([1.0] * found + [0.0] * (200 - found)))}).interval()
        for n_prompts in (200, 520, 5000):
            assert work.blind(n_prompts, 200, found).interval() == pytest.approx(alone, abs=0.001)


def test_simulated_judges_have_the_stated_errors() -> None:
    case = work.CASES[0]
    judged, bad = work.simulate(np.random.default_rng(0), case, 100_000)
    for arm in (0, 1):
        assert bad[arm].mean() == pytest.approx(case.rates[arm], abs=0.005)
        assert judged[arm][bad[arm]].mean() == pytest.approx(case.sensitivity[arm], abs=0.02)
        assert 1 - judged[arm][~bad[arm]].mean() == pytest.approx(case.specificity[arm], abs=0.005)
    seeded = work.SEEDED[2]
    rates = [work.simulate(np.random.default_rng(n), seeded, 400, 5)[1][1].mean() for n in range(200)]
    assert np.mean(rates) == pytest.approx(seeded.truth[1], abs=0.015)
