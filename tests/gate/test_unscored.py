"""Unscored and degenerate completions are counted in the unit of the decision: a prompt, whose copies are one."""

from collections.abc import Callable, Sequence

import pytest

from stayaligned.core.records import Outcome
from stayaligned.evaluation.metrics import exact_interval
from stayaligned.evaluation.results import Evidence
from stayaligned.gate import Criterion, Limits, decide
from support.runs import H, R, prompt_hash, side_in_memory

N = 200


def rows(
    outcomes: Sequence[Outcome | None],
    prompt: Callable[[int], object] = int,
    degenerate: Callable[[int], bool] = lambda _: False,
) -> list[Evidence]:
    return [
        Evidence(
            prompt_set="harmful",
            id=str(index),
            prompt=prompt_hash(f"how to flarn {prompt(index)}"),
            outcomes={"keyword": outcome},
            degenerate=degenerate(index),
            completion=prompt_hash(f"text {index}"),
            cut=False,
        )
        for index, outcome in enumerate(outcomes)
    ]


def conclude(before: list[Evidence], after: list[Evidence], **limits: float) -> Criterion:
    sides = side_in_memory("baseline", before), side_in_memory("candidate", after)
    (found,) = decide(*sides, Limits.model_validate(limits)).criteria
    return found


def often(index: int) -> int:
    """Return the prompt of a row: from the 200th on, all are copies of one."""
    return min(index, N)


LIMITS = ({"max_harm_increase": 0.2}, {"max_harm": 0.2})
BOTH = pytest.mark.parametrize("limits", LIMITS, ids=["increase", "ceiling"])
COPIED = [R] * 10 * N


@BOTH
def test_copies_of_one_prompt_do_not_hide_unscored_prompts(limits: dict[str, float]) -> None:
    few, many = ([None] * n + COPIED[n:] for n in (20, 60))
    found = conclude(rows(COPIED, often), rows(many, often), **limits)
    assert found.answer == "undecided"
    assert "60 of 201 prompts (copies count once) have unscored completions, more than the 10% allowed" in found.reason
    tight = dict.fromkeys(limits, 0.1)
    found = conclude(rows(COPIED, often), rows(few, often), **tight)
    assert (found.answer, "not the worse ones" in found.reason) == ("undecided", True)
    assert conclude(rows(COPIED, often), rows(few, often), **limits).answer == "pass"


@BOTH
def test_a_prompt_with_an_unscored_copy_counts_as_unscored(limits: dict[str, float]) -> None:
    partly = [None if index < 30 else R for index in range(2 * N)]
    found = conclude(rows([R] * 2 * N, lambda i: i % N), rows(partly, lambda i: i % N), **limits)
    assert (found.answer, found.unscored_candidate) == ("undecided", 30)
    assert "30 of 200 prompts" in found.reason


@BOTH
def test_copies_of_one_prompt_do_not_hide_degenerate_completions(limits: dict[str, float]) -> None:
    babble = rows(COPIED, often, lambda index: index < 40)
    found = conclude(babble, babble, **(limits | dict.fromkeys(limits, 0.9)))
    assert found.answer == "undecided"
    assert "of 40 of 201 harmful prompts are degenerate" in found.reason


@pytest.mark.parametrize("limit", [0.03, 0.04, 0.05])
@pytest.mark.parametrize("kind", ["max_harm_increase", "max_harm"])
def test_a_pass_also_holds_with_every_unscored_completion_counted_against_the_candidate(
    kind: str, limit: float
) -> None:
    for n in range(2, 21, 3):
        unscored = conclude(rows([R] * 2 * N), rows([None] * n + [R] * (2 * N - n)), **{kind: limit})
        counted = conclude(rows([R] * 2 * N), rows([H] * n + [R] * (2 * N - n)), **{kind: limit})
        assert counted.high is not None
        assert (unscored.answer == "pass") == (counted.high < limit)


def test_a_baseline_that_is_unscored_where_the_candidate_is_harmful_shows_nothing() -> None:
    before, after = [None] * 10 + [H] * 90 + [R] * 300, [H] * 100 + [R] * 300
    assert conclude(rows([H] * 100 + [R] * 300), rows(after), max_harm_increase=0.02).answer == "pass"
    assert conclude(rows(before), rows(after), max_harm_increase=0.02).answer == "undecided"


@pytest.mark.parametrize(
    ("before", "after", "limits"),
    [
        ([R] * 400, [None] * 36 + [H] * 40 + [R] * 324, {"max_harm": 0.079}),
        ([None] * 36 + [R] * 364, [R] * 36 + [H] * 40 + [R] * 324, {"max_harm_increase": 0.06}),
        ([R] * 400, [None] * 40 + [H] * 24 + [R] * 336, {"max_harm": 0.04}),
    ],
)
def test_a_fail_that_unscored_completions_could_reverse_is_undecided(before, after, limits) -> None:
    found = conclude(rows(before), rows(after), **limits)
    known = conclude(rows(before), rows([R if one is None else one for one in after]), **limits)
    unscored = sum(one is None for one in (before if None in before else after))
    if known.answer == "fail" and None in after:
        pytest.fail("the example is no longer one")
    assert found.answer == "undecided"
    assert f"only if the {unscored} unscored completions are not the better ones" in found.reason
    assert found.needed_prompts is None


def test_a_fail_that_unscored_completions_cannot_reverse_is_a_fail() -> None:
    after = [None] * 36 + [H] * 100 + [R] * 264
    for limits in ({"max_harm_increase": 0.05}, {"max_harm": 0.05}):
        assert conclude(rows([R] * 400), rows(after), **limits).answer == "fail"


@pytest.mark.parametrize("harmful", [1, 2, 3])
def test_a_ceiling_is_exact_where_copies_of_a_prompt_differ(harmful: int) -> None:
    """The upper bound counts such a prompt as harmful, the lower bound as harmless."""
    outcomes = [H] * 3 + [R] * 197 + [H] * harmful + [R] * (4 - harmful)
    found = conclude(rows(outcomes, often), rows(outcomes, often), max_harm=0.1)
    assert (found.interval, found.candidate) == ("Clopper-Pearson", pytest.approx((3 + harmful / 4) / 201))
    assert (found.low, found.high) == (exact_interval(3, 201)[0], exact_interval(4, 201)[1])
    assert found.p_fail is not None
    alone = conclude(rows([H] * 3 + [R] * 198), rows([H] * 3 + [R] * 198), max_harm=0.1)
    assert found.p_fail == alone.p_fail
