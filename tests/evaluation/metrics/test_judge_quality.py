"""A judge's quality is that of all labels where all are given, and its intervals cover it where a sample is."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stayaligned.core.records import Outcome, Verdict
from stayaligned.evaluation.metrics import agreement, exact_interval
from stayaligned.evaluation.metrics.judge_quality import LabelledSample, QualityRate

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
work: Any = importlib.import_module("label_statistics")
sys.path.pop(0)


def everything_labelled(n: int, seed: int, *, arms: int = 1) -> LabelledSample:
    return work.simulate(n, n, 0.3, (0.8, 0.9), arms, seed)


@pytest.mark.parametrize("seed", range(5))
def test_with_every_completion_labelled_the_intervals_are_clopper_pearson(seed: int) -> None:
    sample = everything_labelled(150, seed)
    bad, said = sample.labels[:, 0] == 1, sample.verdicts[:, 0] == 1
    found = sample.quality()
    for rate, hits, n in (
        (found.sensitivity, (bad & said).sum(), bad.sum()),
        (found.specificity, (~bad & ~said).sum(), (~bad).sum()),
        (found.base_rate, bad.sum(), 150),
    ):
        assert (rate.value, rate.n) == (pytest.approx(hits / n), n)
        assert (rate.low, rate.high) == pytest.approx(exact_interval(int(hits), int(n)))


@pytest.mark.parametrize("wrong", [False, True], ids=["always-right", "always-wrong"])
def test_rates_at_the_ends_have_clopper_pearson_intervals(wrong: bool) -> None:
    sample = everything_labelled(60, 0)
    perfect = replace(sample, verdicts=1 - sample.labels if wrong else sample.labels)
    n = int(sample.labels.sum())
    rate = perfect.quality().sensitivity
    assert (rate.low, rate.high) == pytest.approx(exact_interval(0 if wrong else n, n))


def test_kappa_is_that_of_two_judges() -> None:
    sample = everything_labelled(80, 1)
    names = {"judge": sample.verdicts[:, 0], "people": sample.labels[:, 0]}
    verdicts = [
        [
            Verdict(id=str(i), prompt_set="harmful", judge=name, outcome=Outcome.HARM if bad else Outcome.OTHER)
            for i, bad in enumerate(values)
        ]
        for name, values in names.items()
    ]
    expected = agreement("judge", verdicts[0], "people", verdicts[1])
    found = sample.quality()
    assert (found.agreement, found.kappa) == (pytest.approx(expected.agreement), pytest.approx(expected.kappa))


def test_estimates_from_samples_are_right_on_average() -> None:
    every = everything_labelled(200, 2, arms=2)
    patterns = [str(row) for row in every.verdicts.tolist()]
    sums: list[float] = []
    for seed in range(200):
        order = work.draw_order(patterns, {*patterns[:2]}, 60, seed)
        drawn = np.isin(np.arange(200), order[:60])
        own = replace(every, labelled=drawn, labels=np.where(drawn[:, None], every.labels, np.nan))
        value = own.quality().base_rate.value
        assert value is not None
        sums.append(value)
    expected = every.quality().base_rate.value
    assert np.mean(sums) == pytest.approx(expected, abs=4 * np.std(sums) / np.sqrt(len(sums)))
    assert np.std(sums) > 0.01


@pytest.mark.parametrize(
    ("prompts", "labelled", "base_rate", "judge"),
    [
        (520, 50, 0.02, (0.5, 0.8)),
        (520, 100, 0.1, (0.9, 0.99)),
        (520, 100, 0.5, (0.5, 0.8)),
    ],
)
def test_intervals_cover_the_truth(prompts: int, labelled: int, base_rate: float, judge: tuple[float, float]) -> None:
    covered, width = work.coverage(prompts, labelled, base_rate, judge, draws=100)
    assert min(covered) >= 0.94
    assert max(width) < 1


def test_no_error_in_a_few_labels_does_not_mean_no_errors() -> None:
    # 40 prompts of 400 that the judge calls harmless are labelled, all of them harmless; and 20 harmful ones.
    stratum = np.repeat([0, 1], [400, 20])
    drawn = np.isin(np.arange(420), [*range(40), *range(400, 420)])
    verdicts = stratum[:, None].astype(float)
    sample = LabelledSample(stratum, np.arange(420), drawn, verdicts, np.where(drawn[:, None], verdicts, np.nan))
    rate = sample.quality().sensitivity
    assert rate.value == 1
    # Up to 9 % of the 400 may be harmful: 36 beside the 20 that the judge found.
    most = 400 * exact_interval(0, 40)[1]
    assert rate.low == pytest.approx(20 / (20 + most), abs=0.1)


def test_unscored_and_unsure_completions_are_counted_and_left_out() -> None:
    sample = everything_labelled(50, 3)
    verdicts, labels = sample.verdicts.copy(), sample.labels.copy()
    verdicts[:3], labels[3:5] = np.nan, np.nan
    found = replace(sample, verdicts=verdicts, labels=labels).quality()
    assert (found.n, found.n_unscored, found.n_unsure) == (45, 3, 2)
    assert found.sensitivity.n + found.specificity.n == 45
    nothing = replace(sample, labels=np.full_like(labels, np.nan)).quality()
    assert nothing.sensitivity == QualityRate(None, None, None, 0)
    assert (nothing.kappa, nothing.agreement) == (None, None)


def test_a_judge_that_is_worse_on_one_arm_is_found_and_an_equal_one_is_not() -> None:
    worse = 0
    for seed in range(100):
        sample = work.simulate(400, 150, 0.3, (0.9, 0.95), 2, seed)
        p = sample.p_equal(0, 1, bad=True)
        worse += p is not None and p < 0.05
        blind = sample.verdicts.copy()
        blind[:, 1] = 0.0  # never calls the second arm bad
        p = replace(sample, verdicts=blind).p_equal(0, 1, bad=True)
        assert p is not None and p < 0.01
    assert worse <= 11  # of 100 at 5 %, with probability 0.99
    one = replace(sample, labels=np.stack([sample.labels[:, 0], 0 * sample.labels[:, 1]], 1))
    assert one.p_equal(0, 1, bad=True) is None


def test_prompts_that_several_seeds_share_count_less() -> None:
    sample = work.simulate(200, 200, 0.3, (0.8, 0.9), 1, 0)
    shared = replace(sample, prompt=np.arange(200) // 2)
    own, other = sample.quality().sensitivity, shared.quality().sensitivity
    assert None not in (own.low, own.high, other.low, other.high)
    assert other.high - other.low > 1.2 * (own.high - own.low)  # pyright: ignore[reportOptionalOperand]
