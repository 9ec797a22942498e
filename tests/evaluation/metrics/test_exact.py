"""Bounds without an assumed distribution: Clopper and Pearson's for shares, and the level for differences."""

import numpy as np
import pytest
from scipy.special import betainc
from scipy.stats import binom

from stayaligned.evaluation.metrics import exact_interval, mean_of_prompts, paired_needed_n, paired_power
from stayaligned.evaluation.metrics.exact import bounded_tail, dirichlet_tail


@pytest.mark.parametrize("n", [20, 149, 3000])
def test_the_tail_of_two_values_is_that_of_the_beta_distribution(n: int) -> None:
    for hits in (0, 1, n // 20, n // 2):
        for at in (0.001, 0.01, 0.05, 0.3):
            expected = 1 - betainc(hits + 1, n - hits, at)
            assert dirichlet_tail([1, 0], [hits + 1, n - hits], at) == pytest.approx(expected, abs=6e-6)


def test_the_tail_of_many_values_is_the_share_of_simulated_weights() -> None:
    rng = np.random.default_rng(0)
    values, counts = rng.uniform(-1, 1, 40), rng.uniform(0, 3, 40)
    means = rng.dirichlet(counts, 200_000) @ values
    for at in (-0.2, 0.0, 0.1, 0.25):
        assert dirichlet_tail(values, counts, at) == pytest.approx((means > at).mean(), abs=0.004)


@pytest.mark.parametrize(("hits", "n"), [(0, 149), (5, 100), (100, 100), (30, 31)])
def test_the_interval_of_a_share_is_clopper_and_pearsons(hits: int, n: int) -> None:
    values = dict(enumerate([1.0] * hits + [0.0] * (n - hits)))
    mean = mean_of_prompts({0: values}, ends=(0.0, 1.0), exact=True)
    for confidence in (0.9, 0.99):
        expected = exact_interval(hits, n, confidence=confidence)
        assert mean.interval(confidence) == pytest.approx(expected, abs=1e-6)
        mirrored = mean.mirrored().interval(confidence)
        assert mirrored == pytest.approx((-expected[1], -expected[0]), abs=1e-6)


def test_several_seeds_have_the_wider_of_both_intervals() -> None:
    rows = {seed: {i: float(i % 40 == seed) - float(i % 50 == 3) for i in range(200)} for seed in range(3)}
    exact, student = mean_of_prompts(rows, exact=True), mean_of_prompts(rows)
    inside, outside = student.interval(0.9), exact.interval(0.9)
    assert outside[0] <= inside[0]
    assert inside[1] <= outside[1]
    assert exact.p_above(-0.01) >= student.p_above(-0.01)


def largest_error(n: int, margin: float, alpha: float = 0.05) -> float:
    """Return the largest share of passes of a candidate that is worse by the margin, exactly."""
    better = np.arange(min(n, 40))
    low, high = np.full(len(better), -1), n - better
    while (high - low > 1).any():  # the greatest number of worse prompts that passes
        worse = (low + high) // 2
        counts = np.stack([worse, n - better - worse, better], axis=-1)
        passes = bounded_tail((1.0, 0.0, -1.0), counts, margin, end=1.0) <= alpha
        low, high = np.where(passes, worse, low), np.where(passes, high, worse)
    found = []
    for share in (0.0, 0.0001, 0.002, 0.01, 0.03):
        inside = binom.cdf(low, n - better, (margin + share) / (1 - share)) * (low >= 0)
        found.append(float((binom.pmf(better, n, share) * inside).sum()))
    return max(found)


@pytest.mark.parametrize("margin", [0.02, 0.05, 0.1])
@pytest.mark.parametrize("n", [60, 149, 393, 966])
def test_a_candidate_that_is_worse_by_the_margin_passes_at_the_level(n: int, margin: float) -> None:
    assert largest_error(n, margin) <= 0.05


def test_planning_is_the_share_of_simulated_runs() -> None:
    n, draws = 300, 4000
    counts = np.random.default_rng(0).multinomial(n, [0.05, 0.01, 0.94], size=draws)
    different, which = np.unique(counts, axis=0, return_inverse=True)
    above = (bounded_tail((1.0, -1.0, 0.0), different, 0.02, end=-1.0) <= 0.05)[which].mean()
    assert paired_power(0.04, 0.06, n, limit=0.02, confidence=0.9, exact=True) == pytest.approx(above, abs=0.025)


def test_one_sided_tests_need_fewer_prompts() -> None:
    """A fifth fewer, or as for Clopper and Pearson's bound if the models never differ: 0.98^149 < 0.05."""
    assert paired_needed_n(0.0, 0.0, limit=0.02, confidence=0.9, exact=True) == 149
    today = paired_needed_n(0.0, 0.05, limit=0.05)
    fewer = paired_needed_n(0.0, 0.05, limit=0.05, confidence=0.9, exact=True)
    assert (today, fewer) == (199, 164)
