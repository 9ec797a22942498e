"""The interval of a mean over prompts: exact coverage by enumeration, seeds by simulation, and its invariants."""

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from stayaligned.evaluation.metrics import exact_interval, mean_of_prompts
from support.counting import paired_outcomes

RATES = [0.0, 0.001, 0.0058, 0.01, 0.02, 0.035, 0.05, 0.1, 0.14, 0.2, 0.3, 0.5, 0.7]
signs = st.lists(st.sampled_from([-1, 0, 0, 1]), min_size=2, max_size=40)
graded = st.lists(st.floats(-1, 1), min_size=2, max_size=30)


def coverage(interval, n, rate):
    bounds = numpy.array([interval(k, n) for k in range(n + 1)])
    mass = stats.binom.pmf(numpy.arange(n + 1), n, rate)
    return mass[(bounds[:, 0] <= rate) & (rate <= bounds[:, 1])].sum()


@pytest.mark.parametrize("n", [30, 100, 200])
def test_the_interval_of_a_rate_holds_at_every_rate(n):
    assert min(coverage(exact_interval, n, rate) for rate in RATES) >= 0.95


def test_wilsons_interval_is_too_short_near_zero():
    def wilson_interval(k, n):
        return tuple(stats.binomtest(k, n).proportion_ci(method="wilson"))

    assert coverage(wilson_interval, 30, 0.0058) == pytest.approx(0.84, abs=0.005)


@pytest.mark.parametrize("n", [12, 30, 100])
def test_the_interval_of_a_paired_difference_holds_at_every_pair_of_rates(n):
    outcomes = paired_outcomes(n)
    for p10 in RATES:
        for p01 in RATES:
            if p10 + p01 <= 1:
                mass = outcomes.probability(p10, p01)
                difference = p10 - p01
                below, above = mass[outcomes.high < difference - 1e-12], mass[outcomes.low > difference + 1e-12]
                assert below.sum() + above.sum() <= 0.05, (p10, p01)


def test_one_seed_is_students_interval_with_both_ends_added_and_half_a_step():
    found = mean_of_prompts({0: dict(enumerate([1, 0, 0, -1, 1, 0, 0, 0]))})
    oracle = stats.ttest_1samp([1, 0, 0, -1, 1, 0, 0, 0, 1, -1], 0.0).confidence_interval(0.95)
    assert found.interval() == pytest.approx((oracle.low - 1 / 16, oracle.high + 1 / 16))


def test_over_seeds_the_errors_of_seeds_and_prompts_add_up():
    rows = numpy.array([[0.1, 0.5, -0.3, 0.2], [0.4, 0.7, 0.0, 0.6], [0.2, 0.5, -0.1, 0.3]])
    found = mean_of_prompts({seed: dict(enumerate(row)) for seed, row in enumerate(rows.tolist())})
    prompts = numpy.array([*rows.mean(axis=0), 1.0, -1.0])
    seeds = rows.mean(axis=1).var(ddof=1) / 3
    added = prompts.var(ddof=1) / 6
    free = (seeds + added) ** 2 / (seeds**2 / 2 + added**2 / 5)
    half = max(stats.t.ppf(0.975, free) * (seeds + added) ** 0.5, stats.t.ppf(0.975, 2) * seeds**0.5)
    assert found.interval() == pytest.approx((max(-1, prompts.mean() - half), min(1, prompts.mean() + half)))


def test_seeds_with_prompts_of_their_own_are_compared_by_seed():
    rows = {
        seed: {f"{seed}-{i}": level + (i % 2) / 10 for i in range(60)} for seed, level in enumerate([0.1, 0.3, 0.6])
    }
    found = mean_of_prompts(rows)
    assert not found.shared
    low, high = stats.ttest_1samp([0.15, 0.35, 0.65], 0.0).confidence_interval(0.95)
    assert found.half_width() == pytest.approx((high - low) / 2)


def simulated(rng, seeds, n, shared):
    """Differences whose mean is 0.1 on average: prompts, seeds and chance each move them; one in five is not 0."""
    prompts = rng.normal(size=(1 if shared else seeds, n))
    spread = rng.normal(size=(seeds, 1)) * 0.03
    weights = 0.15 + spread + 0.1 * numpy.tanh(prompts)
    draws = rng.random((seeds, n))
    return (draws < weights).astype(float) - (draws > 0.95)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_the_interval_over_seeds_holds(seeds, shared):
    rng = numpy.random.default_rng(seeds)
    held = 0
    for _ in range(300):
        rows = simulated(rng, seeds, 30, shared)
        keys = (lambda s, i: i) if shared else (lambda s, i: (s, i))
        found = mean_of_prompts({s: {keys(s, i): v for i, v in enumerate(row)} for s, row in enumerate(rows.tolist())})
        low, high = found.interval()
        held += low <= 0.1 <= high
    assert held / 300 >= 0.95 - 2 * (0.95 * 0.05 / 300) ** 0.5


@given(st.lists(graded, min_size=1, max_size=4), st.sampled_from([0.8, 0.9, 0.95, 0.99]), st.floats(-0.9, 0.9))
def test_the_p_value_is_the_inverse_of_the_interval(seeds, confidence, limit):
    found = mean_of_prompts({seed: dict(enumerate(values)) for seed, values in enumerate(seeds)})
    mirrored = mean_of_prompts({seed: dict(enumerate(-x for x in values)) for seed, values in enumerate(seeds)})
    middle, half = found.center, found.half_width(confidence)
    if abs(middle - half - limit) > 1e-9 and abs(middle + half - limit) > 1e-9:
        assert (middle - half > limit) == (found.p_above(limit) < (1 - confidence) / 2)
        assert (middle + half < limit) == (mirrored.p_above(-limit) < (1 - confidence) / 2)


@given(st.one_of(signs, graded), st.randoms())
def test_the_difference_is_antisymmetric_and_the_order_of_prompts_does_not_matter(values, random):
    found = mean_of_prompts({0: dict(enumerate(values))})
    turned = mean_of_prompts({0: {i: -value for i, value in enumerate(values)}})
    low, high = found.interval()
    assert turned.interval() == pytest.approx((-high, -low))
    rows = [*enumerate(values)]
    random.shuffle(rows)
    assert mean_of_prompts({0: dict(rows)}).interval() == pytest.approx((low, high))


@given(signs)
def test_more_prompts_alike_narrow_the_interval(values):
    one = mean_of_prompts({0: dict(enumerate(values))})
    four = mean_of_prompts({0: dict(enumerate(values * 4))})
    assert four.half_width() < one.half_width()


@given(st.lists(st.sampled_from([-1, 0, 0, 0, 1]), min_size=20, max_size=60), st.floats(0.02, 0.4))
def test_prompts_to_decide_are_found_by_the_same_interval(values, limit):
    found = mean_of_prompts({0: dict(enumerate(values))})
    n = found.prompts_to_decide(limit)
    if n is not None and n > 2 and found.value < limit:
        assert found.resized(n).interval()[1] <= limit
        assert found.resized(4 * n).interval()[1] < limit
    assert found.prompts_to_decide(found.value) is None


def test_what_is_not_on_the_scale_is_refused():
    with pytest.raises(ValueError, match="scale"):
        mean_of_prompts({0: {"a": 1.5}})
    with pytest.raises(ValueError, match="cannot average"):
        mean_of_prompts({0: {"a": 1.0}, 1: {}})


@given(st.lists(st.lists(st.sampled_from([-1, 0, 0, 1]), min_size=6, max_size=6), min_size=1, max_size=4))
def test_the_p_value_is_small_exactly_if_the_interval_excludes_the_value(table):
    found = mean_of_prompts({seed: dict(enumerate(row)) for seed, row in enumerate(table)})
    p_value = found.p_value()
    for alpha in (0.01, 0.05, 0.2, 0.5):
        half = found.half_width(1 - alpha)
        if abs(abs(found.center) - half) > 1e-9:
            assert (p_value < alpha) == (abs(found.center) > half)
    assert found.mirrored().p_value() == pytest.approx(p_value)
    assert found.mirrored().mirrored() == found


@given(st.lists(st.booleans(), min_size=2, max_size=20), st.integers(1, 4))
def test_copies_of_all_prompts_change_nothing_and_a_list_of_one_is_a_number(values, copies):
    numbers = {i: float(value) for i, value in enumerate(values)}
    once = mean_of_prompts({0: numbers, 1: numbers}, ends=(0.0, 1.0))
    repeated = mean_of_prompts({s: {i: [v] * copies for i, v in numbers.items()} for s in (0, 1)}, ends=(0.0, 1.0))
    assert repeated.interval() == pytest.approx(once.interval())
    assert (repeated.value, repeated.n_prompts) == (pytest.approx(once.value), once.n_prompts)
