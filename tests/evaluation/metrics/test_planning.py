"""Planned numbers of prompts give the power that they promise: exactly, where the outcomes can be counted."""

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from stayaligned.evaluation import metrics
from support.counting import paired_outcomes


def test_needed_n_gives_the_power_it_promises():
    n = metrics.needed_n(0.5, 0.4)
    rng = numpy.random.default_rng(0)
    first, second = rng.binomial(n, 0.5, 40_000) / n, rng.binomial(n, 0.4, 40_000) / n
    pooled = (first + second) / 2
    z = (first - second) / numpy.sqrt(2 * pooled * (1 - pooled) / n)
    assert (abs(z) > 1.959964).mean() == pytest.approx(0.8, abs=0.015)
    assert metrics.needed_n(0.4, 0.5) == n
    with pytest.raises(ValueError, match="different"):
        metrics.needed_n(0.3, 0.3)


@given(st.floats(0.01, 0.99), st.floats(0.01, 0.99), st.sampled_from([0.5, 0.8, 0.95]))
def test_power_turns_needed_n_round(first, second, power):
    if abs(first - second) > 0.02:
        n = metrics.needed_n(first, second, power=power)
        assert metrics.power(first, second, n) >= power - 1e-9
        assert n <= 2 or metrics.power(first, second, n - 1) < power + 1e-9


@pytest.mark.parametrize(("difference", "discordant"), [(0.05, 0.1), (0.1, 0.3), (-0.08, 0.12)])
def test_paired_needed_n_gives_the_power_it_promises_by_enumeration(difference, discordant):
    n = metrics.paired_needed_n(difference, discordant)
    sign = 1 if difference > 0 else -1
    p10, p01 = (discordant + difference) / 2, (discordant - difference) / 2
    outcomes = paired_outcomes(n)
    beyond = outcomes.low > 0 if sign > 0 else outcomes.high < 0
    assert outcomes.probability(p10, p01)[beyond].sum() == pytest.approx(0.8, abs=0.04)
    assert metrics.paired_needed_n(-difference, discordant) == n


def test_an_unchanged_model_passes_as_often_as_planned_by_enumeration():
    margin, discordant = 0.05, 0.06
    n = metrics.paired_needed_n(0.0, discordant, limit=margin, power=0.9)
    outcomes = paired_outcomes(n)
    assert outcomes.probability(0.03, 0.03)[outcomes.high < margin].sum() == pytest.approx(0.9, abs=0.04)
    # One that is worse by exactly the margin passes in less than one case in twenty.
    assert outcomes.probability(0.055, 0.005)[outcomes.high < margin].sum() < 0.05


@given(st.floats(0.01, 0.4), st.floats(0, 0.5), st.integers(20, 2000))
def test_more_prompts_or_a_larger_difference_give_no_less_power(difference, spare, n):
    discordant = min(1.0, difference + spare)
    here = metrics.paired_power(difference, discordant, n)
    assert metrics.paired_power(difference, discordant, 2 * n) >= here - 1e-9
    assert 0 <= here <= 1


def test_what_no_number_of_prompts_can_show_is_none():
    assert metrics.paired_needed_n(0.02, 0.1, limit=0.02) is None
    # Two seeds that spread by five points never show two.
    assert metrics.paired_needed_n(0.02, 0.1, seeds=2, seed_spread=0.05) is None
    assert metrics.paired_needed_n(0.02, 0.1, seeds=5, seed_spread=0.005) is not None
    with pytest.raises(ValueError, match="discordant"):
        metrics.paired_needed_n(0.2, 0.1)


def test_the_detectable_difference_is_the_one_that_needs_so_many_prompts():
    found = metrics.detectable_difference(0.05, lambda d: metrics.power(0.05, 0.05 + d, 400))
    assert metrics.needed_n(0.05, 0.05 + found) == pytest.approx(400, abs=1)
    assert metrics.detectable_difference(0.9, lambda d: metrics.power(0.9, 0.9 + d, 10)) is None


@given(st.floats(0, 1), st.floats(0, 1))
def test_independent_answers_differ_at_least_as_often_as_the_rates_do(first, second):
    assert abs(first - second) - 1e-12 <= metrics.discordance(first, second) <= 1


@pytest.mark.parametrize(
    ("difference", "discordant", "limit", "n"),
    [(0.0, 0.0, 0.05, 66), (0.0, 0.005, 0.05, 88), (0.0, 0.01, 0.1, 44), (0.1, 0.1, 0.05, 120), (-0.05, 0.08, 0.0, 90)],
)
def test_paired_power_is_the_exact_probability_of_the_decision(difference, discordant, limit, n):
    outcomes = paired_outcomes(n)
    beyond = outcomes.low > limit if difference >= limit else outcomes.high < limit
    exact = outcomes.probability((discordant + difference) / 2, (discordant - difference) / 2)[beyond].sum()
    assert metrics.paired_power(difference, discordant, n, limit=limit) == pytest.approx(exact, abs=1e-9)


@pytest.mark.parametrize(("discordant", "limit"), [(0.0, 0.02), (0.005, 0.05), (0.01, 0.1), (0.02, 0.03), (0.05, 0.05)])
def test_an_unchanged_model_passes_with_the_needed_prompts_and_with_more(discordant, limit):
    needed = metrics.paired_needed_n(0.0, discordant, limit=limit, power=0.9)
    for n in (needed, needed + 1, needed + 3, needed * 9 // 8, needed * 2):
        assert metrics.paired_power(0.0, discordant, n, limit=limit) >= 0.9
    assert metrics.paired_power(0.0, discordant, needed - 1, limit=limit) < 0.9


@pytest.mark.parametrize(
    ("rate", "ceiling"), [(0.0, 0.02), (0.01, 0.02), (0.004, 0.05), (0.05, 0.02), (1.0, 0.98), (0.1, 0.2)]
)
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_a_ceiling_is_decided_by_the_exact_interval_as_often_as_planned(rate, ceiling, confidence):
    for n in (10, 60, 150, 400):
        bounds = [metrics.exact_interval(k, n, confidence=confidence) for k in range(n + 1)]
        decided = [high < ceiling if rate < ceiling else low > ceiling for low, high in bounds]
        truth = binom.pmf(range(n + 1), n, rate)[decided].sum()
        assert metrics.ceiling_power(rate, ceiling, n, confidence=confidence) == pytest.approx(truth, abs=1e-12)
    needed = metrics.ceiling_needed_n(rate, ceiling, confidence=confidence)
    assert metrics.ceiling_power(rate, ceiling, needed, confidence=confidence) >= 0.8
    assert metrics.ceiling_power(rate, ceiling, needed - 1, confidence=confidence) < 0.8


def test_the_smallest_limit_is_the_first_that_is_passed_often_enough():
    found = metrics.smallest_limit(lambda limit: metrics.paired_power(0.0, 0.02, 250, limit=limit))
    assert (
        metrics.paired_power(0.0, 0.02, 250, limit=found)
        >= 0.9
        > metrics.paired_power(0.0, 0.02, 250, limit=found - 1e-4)
    )
    assert metrics.smallest_limit(lambda _: 0.0) is None
