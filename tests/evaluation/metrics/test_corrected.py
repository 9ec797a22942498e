"""Means corrected by labels: against all labels, all possible draws, the formula of the literature, and simulation."""

import itertools
import random
from collections.abc import Sequence
from statistics import fmean, pvariance

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stayaligned.evaluation.metrics import LabelledValue, corrected_mean, mean_of_prompts

Frame = list[LabelledValue]
CELLS = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 11), st.sampled_from("abc"), *[st.sampled_from([-1.0, 0.0, 1.0])] * 2),
    min_size=3,
    max_size=60,
)


def frame(cells) -> Frame:
    return [LabelledValue(*cell) for cell in cells]


def keep(items: Sequence[LabelledValue], drawn: set[int]) -> Frame:
    return [item if index in drawn else item._replace(label=None) for index, item in enumerate(items)]


def draw(rng: random.Random, items: Sequence[LabelledValue], least: int = 2) -> Frame:
    """Label a random half of each stratum, at least `least` items of it."""
    drawn: set[int] = set()
    for stratum in {item.stratum for item in items}:
        members = [index for index, item in enumerate(items) if item.stratum == stratum]
        drawn |= set(rng.sample(members, min(len(members), max(least, len(members) // 2))))
    return keep(items, drawn)


@settings(max_examples=40)
@given(CELLS)
def test_labels_of_all_items_give_the_plain_mean_of_the_labels(cells) -> None:
    items = frame(cells)
    found = corrected_mean(items)
    rows: dict[int, dict[int, list[float]]] = {}
    for seed, prompt, _, _, label in cells:
        rows.setdefault(seed, {}).setdefault(prompt, []).append(label)
    means = {seed: {prompt: fmean(copies) for prompt, copies in row.items()} for seed, row in rows.items()}
    expected = mean_of_prompts(means)
    assert found.value == pytest.approx(expected.value)
    assert found.interval() == pytest.approx(expected.interval())
    assert found.p_above(0.1) == pytest.approx(expected.p_above(0.1))


@settings(max_examples=25)
@given(CELLS, st.randoms(use_true_random=False))
def test_it_is_antisymmetric_and_labels_widen_it(cells, rng) -> None:
    items = draw(rng, frame(cells), least=1)
    there = corrected_mean(items)
    back = corrected_mean([i._replace(judged=-i.judged, label=None if i.label is None else -i.label) for i in items])
    assert there.interval() == pytest.approx([-bound for bound in reversed(back.interval())])
    assert there.mirrored().interval() == pytest.approx(back.interval())
    low, high = there.interval(0.9)
    assert (there.p_above(low - 1e-6) < 0.05) or low == -1
    assert low <= there.center <= high


def test_it_is_unbiased_over_all_possible_draws_from_strata_of_verdicts() -> None:
    cells = [(0, n, "ab"[n > 4], d, label) for n, (d, label) in enumerate(zip("00000111", "01001101", strict=True))]
    items = frame((seed, prompt, stratum, float(d), float(label)) for seed, prompt, stratum, d, label in cells)
    draws = [{*a, *b} for a in itertools.combinations(range(5), 3) for b in itertools.combinations(range(5, 8), 2)]
    found = [corrected_mean(keep(items, drawn), ends=(0.0, 1.0)) for drawn in draws]
    values = [one.value for one in found]
    assert fmean(values) == pytest.approx(fmean(item.label or 0 for item in items))
    assert fmean(one.draw_variance for one in found) == pytest.approx(pvariance(values))


@pytest.mark.parametrize("varies", [False, True], ids=["verdict-strata", "other-judge"])
def test_it_is_the_estimate_of_prediction_powered_inference(varies: bool) -> None:
    rng = random.Random(3)
    items: Frame = []
    for n in range(200):
        judged = rng.choice([0.0, 0.0, 1.0])
        label = judged if rng.random() < 0.8 else 1 - judged
        other = judged if not varies or rng.random() < 0.7 else 1 - judged
        items.append(LabelledValue(0, n, f"judge says {judged}", other, label))
    items = draw(rng, items)
    found = corrected_mean(items)
    sizes = {s: [sum(i.stratum == s for i in items), sum(i.stratum == s and i.label is not None for i in items)]
             for s in {i.stratum for i in items}}  # fmt: skip

    def powered(weight: float) -> float:
        rest = [
            sizes[i.stratum][0] / sizes[i.stratum][1] * (i.label - weight * i.judged)
            for i in items
            if i.label is not None
        ]
        return weight * fmean(i.judged for i in items) + sum(rest) / len(items)

    assert found.value == pytest.approx(powered(found.judge_weight))
    if varies:
        assert 0 < found.judge_weight < 1
        least = found.label_variance
        for weight in (0.0, 1.0):
            fixed = [i._replace(judged=0.0, label=None if i.label is None else i.label - weight * i.judged)
                     for i in items]  # fmt: skip
            assert corrected_mean(fixed).label_variance > least
    else:
        assert powered(0.0) == pytest.approx(powered(0.6))


def test_a_stratum_without_a_label_and_a_value_off_the_scale_are_errors() -> None:
    items = frame([(0, 0, "a", 0.0, 1.0), (0, 1, "b", 0.0, None)])
    with pytest.raises(ValueError, match="a stratum has no label"):
        corrected_mean(items)
    with pytest.raises(ValueError, match="not on the scale"):
        corrected_mean([items[0]._replace(label=2.0)])
    with pytest.raises(ValueError, match="there are no items"):
        corrected_mean([])


@pytest.mark.parametrize(
    ("sensitivity", "specificity"), [((0.9, 0.7), (0.99, 0.99)), ((0.9, 0.9), (0.99, 0.93)), ((0.9, 0.1), (1, 1))]
)
def test_it_covers_where_the_judge_is_worse_on_one_arm(sensitivity, specificity) -> None:
    rng, picks = np.random.default_rng(1), random.Random(1)
    held = plain = 0
    for _ in range(80):
        labels = rng.random((2, 300)) < np.array([[0.1], [0.16]])
        chance = rng.random((2, 300))
        verdicts = np.where(labels, chance < np.array([sensitivity]).T, chance < 1 - np.array([specificity]).T)
        items = [
            LabelledValue(0, n, f"{b}{a}", float(a) - float(b), float(after) - float(before))
            for n, (b, a, before, after) in enumerate(zip(*verdicts.tolist(), *labels.tolist(), strict=True))
        ]
        low, high = corrected_mean(draw(picks, items)).interval()
        held += low <= 0.06 <= high
        low, high = mean_of_prompts({0: {n: item.judged for n, item in enumerate(items)}}).interval()
        plain += low <= 0.06 <= high
    assert held >= (0.94 - 2 * (0.94 * 0.06 / 80) ** 0.5) * 80
    assert plain < 0.85 * 80


def test_labels_of_copies_do_not_stand_for_prompts_without_a_label() -> None:
    """The judge is blind, 8 % of the prompts got worse, and most of what is labelled is copies of a single prompt."""
    held = 0
    for seed in range(40):
        picks = random.Random(seed)
        worse = {*picks.sample(range(200), 16)}
        items = [LabelledValue(0, n, "a", 0.0, float(n in worse)) for n in range(200)]
        items += [LabelledValue(0, "copied", "a", 0.0, 0.0)] * picks.choice([2000, 20_000])
        low, high = corrected_mean(keep(items, {*picks.sample(range(len(items)), 100)})).interval()
        held += low <= 16 / 201 <= high
    assert held >= 38


def test_more_labels_are_planned_by_the_variance_that_they_have() -> None:
    rng = random.Random(5)
    items = [LabelledValue(0, n, "ab"[n % 5 == 0], float(n % 5 == 0), float(n % 20 == 0)) for n in range(1000)]
    draws = [[corrected_mean(draw_exactly(rng, items, n)) for _ in range(20)] for n in (60, 300)]
    expected = fmean(one.relabelled(300).half_width() for one in draws[0])
    assert expected == pytest.approx(fmean(one.half_width() for one in draws[1]), rel=0.1)
    few = draws[0][0]
    assert few.relabelled(1000).label_variance == 0
    needed = few.labels_to_decide(few.value + 0.05)
    assert needed is not None
    assert few.relabelled(needed).chance_above(few.value + 0.05) < 0.2
    assert few.labels_to_decide(few.value + 0.001) is None
    assert few.prompts_to_decide(few.value + 0.05) is not None


def draw_exactly(rng: random.Random, items: Frame, n: int) -> Frame:
    drawn: set[int] = set()
    for stratum in ("a", "b"):
        members = [index for index, item in enumerate(items) if item.stratum == stratum]
        drawn |= set(rng.sample(members, n * len(members) // len(items)))
    return keep(items, drawn)


@pytest.mark.parametrize("ends", [(-1.0, 1.0), (0.0, 1.0)], ids=["change", "rate"])
def test_labels_of_which_the_judge_tells_nothing_have_the_interval_of_as_many_prompts(ends) -> None:
    labels = [1.0] * 2 + [0.0] * 98
    alone = mean_of_prompts({0: dict(enumerate(labels))}, ends=ends).interval()
    items = [LabelledValue(0, n, "all", 0.0, labels[n] if n < 100 else None) for n in range(2000)]
    assert corrected_mean(items, ends=ends).interval() == pytest.approx(alone, abs=0.001)


def test_prompts_that_some_seeds_share_count_for_more_than_those_of_one_seed() -> None:
    def found(shared: int) -> float:
        items = [
            LabelledValue(seed, n if n < shared else 100 * (seed + 1) + n, "all", 0.0, float((n + seed) % 4 == 0))
            for seed in range(3)
            for n in range(60)
        ]
        return corrected_mean(keep(items, {*range(0, 180, 2)})).prompt_variance / (180 - 2 * shared)

    # 30 prompts with three values each and 90 with one, of 1.5 on average, against 180 with one.
    crowding = (30 * 3**2 + 90) / 1.5**2 / 120
    assert found(30) * 119 == pytest.approx(crowding * found(0) * 179)
