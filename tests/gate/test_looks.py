"""Planned looks: published boundaries, the joint normal distribution, and the error over all looks."""

import numpy as np
import pytest
from scipy.stats import multivariate_normal, norm

from stayaligned.core.errors import StayalignedError
from stayaligned.gate import Limits, decide
from stayaligned.gate.looks import Look, level_at, parse_look, repeated_p
from support.runs import evidence, outcomes, side_in_memory


def boundaries(planned: int, alpha: float = 0.025) -> list[float]:
    return [norm.isf(level_at(Look(number=k, planned=planned), alpha)) for k in range(1, planned + 1)]


@pytest.mark.parametrize(
    "published",
    [(2.963, 1.969), (3.710, 2.511, 1.993), (4.333, 2.963, 2.359, 2.014), (4.877, 3.357, 2.680, 2.290, 2.031)],
    ids=len,
)
def test_the_boundaries_are_the_published_ones(published: tuple[float, ...]) -> None:
    """Those of spending like O'Brien and Fleming's, two-sided 0.05, at equal steps."""
    assert boundaries(len(published)) == pytest.approx(published, abs=6e-4)


@pytest.mark.parametrize("alpha", [0.001, 0.025, 0.05])
def test_all_looks_together_err_at_the_level(alpha: float) -> None:
    z = boundaries(3, alpha)
    share = np.arange(1, 4) / 3
    cov = np.sqrt(np.minimum.outer(share, share) / np.maximum.outer(share, share))
    joint = multivariate_normal(cov=cov, maxpts=300_000, abseps=1e-7, releps=1e-7, seed=0)
    assert 1 - joint.cdf(z) == pytest.approx(alpha, abs=2e-6)


@pytest.mark.parametrize("look", [Look(number=k, planned=5) for k in (1, 4, 5)], ids=str)
def test_a_repeated_p_value_rejects_where_the_level_does(look: Look) -> None:
    for alpha in (1e-3, 0.05):
        level = level_at(look, alpha)
        assert level < alpha
        assert repeated_p(level, look) == pytest.approx(alpha, rel=1e-5)
        assert repeated_p(level * 0.99, look) < alpha < repeated_p(level * 1.01, look)
    assert [repeated_p(p, look) for p in (0.0, 0.6, 1.0)] == [0.0, 1.0, 1.0]
    assert repeated_p(0.3, None) == 0.3


@pytest.mark.parametrize("text", ["0/4", "5/4", "1/1", "3", "2/40", "2/4/6", "", "-1/4", "two/4", "٢/٤"])
def test_another_look_is_one_error(text: str) -> None:
    with pytest.raises(StayalignedError, match=r"--look .*: expected K/N"):
        parse_look(text)


def harm(n: int, before: int, after: int, **limits):
    sides = (side_in_memory("candidate", evidence({"keyword": outcomes(n, count)})) for count in (before, after))
    return decide(*sides, Limits(**({"max_harm_increase": 0.05} | limits)))


def test_an_early_look_decides_less_and_says_how_to_go_on() -> None:
    once = harm(300, 4, 10)
    first, last = (harm(300, 4, 10, look=look) for look in ("1/3", "3/3"))
    assert (once.answer, first.answer, last.answer) == ("pass", "undecided", "pass")
    assert first.sentence.startswith("UNDECIDED (look 1 of 3): ")
    assert first.sentence.endswith("Go on to look 2 of 3.")
    high = [decision.criteria[0].high for decision in (once, last, first)]
    assert high == sorted(high)
    assert first.look == Look(number=1, planned=3)
    failed = harm(300, 4, 40, look="2/3")
    assert (failed.answer, failed.interval_confidence) == ("fail", pytest.approx(1 - 2 * norm.sf(2.511), abs=1e-4))
