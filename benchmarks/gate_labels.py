"""The sections of `gate_statistics.py` on labels: coverage, false passes, and how many labels cases need."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from scipy.special import ndtri
from scipy.stats import binom

from stayaligned.evaluation.labelling.drawing import draw_order
from stayaligned.evaluation.metrics import CorrectedMean, LabelledValue, corrected_mean, mean_of_prompts
from stayaligned.evaluation.metrics.label_planning import LabelPlan

Array = np.ndarray
PROMPTS, LABELS = 520, (50, 100, 200)


def sections() -> list[tuple[str, Iterator[list[str]]]]:
    """Return title and rows of each table."""
    rng = np.random.default_rng(1)
    return [
        ("Labels: coverage and width of the corrected interval, 520 prompts", coverage(rng)),
        ("Labels: several seeds on the same 200 prompts", seeded(rng)),
        ("Labels: most passes of a candidate worse by the limit, all unseen, exactly", blind_candidates()),
        ("Labels: passes of a candidate that is worse by exactly the limit", false_passes(rng)),
        ("Labels: labelled prompts with which an unchanged model passes in 9 of 10 cases", needed()),
        ("Labels: several seeds that lie far apart", seeded(np.random.default_rng(7), [FAR_APART])),
    ]


@dataclass(frozen=True)
class Case:
    """Two models and a judge."""

    title: str
    rates: tuple[float, float]
    """Share of harm of the baseline and of the candidate."""
    sensitivity: tuple[float, float]
    specificity: tuple[float, float]
    alike: float = 0.5
    """Correlation of what makes both models do harm on one prompt."""
    between_seeds: float = 0.0
    """Spread of the candidate's seeds, on the same scale, where prompts have a spread of 1."""

    @property
    def truth(self) -> tuple[float, float]:
        """Share of harm of both models over all prompts and seeds."""
        after = ndtri(self.rates[1]) / math.sqrt(1 + self.between_seeds**2)
        return self.rates[0], 0.5 * math.erfc(-after / math.sqrt(2))


CASES = (
    Case("sensitivity falls from 0.9 to 0.7", (0.1, 0.1), (0.9, 0.7), (0.99, 0.99)),
    Case("the same, 30 % harm", (0.3, 0.3), (0.9, 0.7), (0.99, 0.99)),
    Case("specificity falls from 0.99 to 0.93", (0.1, 0.1), (0.9, 0.9), (0.99, 0.93)),
    Case("blind to the candidate's 5 points of harm", (0.05, 0.1), (0.9, 0.45), (0.99, 0.99)),
    Case("blind to all of the candidate's harm", (0.02, 0.07), (0.9, 0.0), (0.99, 1.0), alike=0.3),
    Case("perfect judge, harm rises by 5 points", (0.1, 0.15), (1.0, 1.0), (1.0, 1.0)),
    Case("useless judge", (0.1, 0.1), (0.3, 0.3), (0.7, 0.7)),
    Case("equal models", (0.1, 0.1), (0.9, 0.9), (0.98, 0.98)),
    Case("1 % harm", (0.01, 0.01), (0.9, 0.9), (0.99, 0.99)),
    Case("1 % rises to 3 %, mostly unseen", (0.01, 0.03), (0.9, 0.3), (0.995, 0.995)),
)
SEEDED = (
    Case("sensitivity falls, seeds don't matter", (0.1, 0.1), (0.9, 0.7), (0.99, 0.99)),
    Case("blind to 5 points, seeds matter a little", (0.05, 0.1), (0.9, 0.45), (0.99, 0.99), between_seeds=0.15),
    Case("30 % harm, seeds matter more", (0.3, 0.3), (0.9, 0.8), (0.95, 0.95), alike=0.8, between_seeds=0.3),
)
FAR_APART = Case("30 % harm, seeds matter most", (0.3, 0.3), (0.9, 0.8), (0.95, 0.95), alike=0.8, between_seeds=0.6)


def simulate(rng: np.random.Generator, case: Case, n_prompts: int, seeds: int = 1) -> tuple[Array, Array]:
    """Return what the judge and people say about both models: shaped (2, seeds, prompts)."""
    prompts = rng.normal(size=n_prompts) * math.sqrt(case.alike)
    own = rng.normal(size=(2, seeds, n_prompts)) * math.sqrt(1 - case.alike)
    levels = ndtri(np.array(case.rates)).reshape(2, 1, 1) + np.zeros((2, seeds, 1))
    levels[1] += rng.normal(size=(seeds, 1)) * case.between_seeds
    bad = prompts + own < levels
    chance = rng.random(bad.shape)
    sensitivity, specificity = (np.array(pair).reshape(2, 1, 1) for pair in (case.sensitivity, case.specificity))
    return np.where(bad, chance < sensitivity, chance >= specificity), bad


def label(rng: np.random.Generator, judged: Array, bad: Array, labelled: int, *, rate: bool) -> list[LabelledValue]:
    """Label items in the order in which `stayaligned label` draws them; the value is the difference, or the rate."""
    prompts = judged.shape[-1]
    strata = [f"{a}{b}" for a, b in judged.reshape(2, -1).T.astype(int)]
    drawn = {*draw_order(strata, {"01", "10", "11"}, labelled, int(rng.integers(1 << 40)))[:labelled]}
    says, people = (values[1].astype(float) - (0.0 if rate else values[0]) for values in (judged, bad))
    return [
        LabelledValue(n // prompts, n % prompts, strata[n], said, truth if n in drawn else None)
        for n, (said, truth) in enumerate(zip(says.ravel().tolist(), people.ravel().tolist(), strict=True))
    ]


def plain(items: list[LabelledValue], values: list[float], ends: tuple[float, float]) -> tuple[float, float]:
    """Return the interval of some values without labels."""
    rows: dict[int, dict[int, float]] = {}
    for number, value in enumerate(values):
        rows.setdefault(items[number].seed, {})[number] = value
    return mean_of_prompts(rows, ends=ends).interval()


def coverage(rng: np.random.Generator, draws: int = 400) -> Iterator[list[str]]:
    """Yield coverage and width with labels, by as many labels of random prompts alone, and by the judge alone."""
    yield [
        "judge",
        "value",
        "labels",
        "corrected: coverage",
        "width",
        "labels alone: coverage",
        "width",
        "judge alone: coverage",
        "bias of the corrected value",
        f"± ({draws} draws)",
    ]
    spread = 2 * (0.95 * 0.05 / draws) ** 0.5
    for rate, cases, numbers in ((False, CASES, LABELS), (True, CASES, (100,))):
        for case in cases:
            for labelled in numbers:
                found = _cover(rng, case, labelled, draws, rate=rate)
                yield [case.title, "rate" if rate else "change", str(labelled), *found, f"{spread:.3f}"]


def _cover(rng: np.random.Generator, case: Case, labelled: int, draws: int, *, rate: bool) -> list[str]:
    truth, ends = (case.truth[1], (0.0, 1.0)) if rate else (case.truth[1] - case.truth[0], (-1.0, 1.0))
    held, widths, off = np.zeros(3), np.zeros(3), 0.0
    for _ in range(draws):
        judged, bad = simulate(rng, case, PROMPTS)
        items = label(rng, judged, bad, labelled, rate=rate)
        people = (bad[1].astype(float) - (0.0 if rate else bad[0])).ravel()
        corrected = corrected_mean(items, ends=ends)
        alone = plain(items, rng.choice(people, labelled, replace=False).tolist(), ends)
        intervals = (corrected.interval(), alone, plain(items, [item.judged for item in items], ends))
        held += [low <= truth <= high for low, high in intervals]
        widths += [high - low for low, high in intervals]
        off += corrected.value - truth
    shares, means = held / draws, 100 * widths / draws
    bias = f"{100 * off / draws:+.2f} points"
    return [f"{shares[0]:.3f}", f"{means[0]:.1f}", f"{shares[1]:.3f}", f"{means[1]:.1f}", f"{shares[2]:.3f}", bias]


def seeded(
    rng: np.random.Generator, cases: Sequence[Case] = SEEDED, draws: int = 200, n_prompts: int = 200
) -> Iterator[list[str]]:
    """Yield the coverage over several seeds that share their prompts, with labels of some items and of all."""
    yield ["judge", "seeds", "labels", "corrected: coverage", "width", "all labelled: coverage", f"± ({draws} draws)"]
    for case in cases:
        truth = case.truth[1] - case.truth[0]
        for seeds in (3, 5):
            for labelled in (100, 300):
                found: list[tuple[bool, float, bool]] = []
                for _ in range(draws):
                    judged, bad = simulate(rng, case, n_prompts, seeds)
                    low, high = corrected_mean(label(rng, judged, bad, labelled, rate=False)).interval()
                    every = corrected_mean(label(rng, judged, bad, seeds * n_prompts, rate=False)).interval()
                    found.append((low <= truth <= high, high - low, every[0] <= truth <= every[1]))
                held, width, full = (fmean(column) for column in zip(*found, strict=True))
                spread = 2 * (0.95 * 0.05 / draws) ** 0.5
                shown = [f"{held:.3f}", f"{100 * width:.1f}", f"{full:.3f}", f"{spread:.3f}"]
                yield [case.title, str(seeds), str(labelled), *shown]


def blind(n_prompts: int, labelled: int, found: int) -> CorrectedMean:
    """Return the corrected change if the judge sees no harm, and people see it in some of the labelled prompts."""
    labels = [*([1.0] * found), *([0.0] * (labelled - found)), *([None] * (n_prompts - labelled))]
    return corrected_mean([LabelledValue(0, n, "00", 0.0, value) for n, value in enumerate(labels)])


def blind_passes(n_prompts: int, labelled: int, limit: float) -> float:
    """Compute the probability of a pass for a candidate that is worse by the limit, if the judge sees none of it."""
    found = 0
    while found <= labelled and blind(n_prompts, labelled, found).interval()[1] < limit:
        found += 1
    return float(binom.cdf(found - 1, labelled, limit))


def blind_candidates(n_prompts: int = PROMPTS) -> Iterator[list[str]]:
    """Yield the largest share of false passes, over the number of labels, by enumeration."""
    yield ["limit", f"most passes, of {n_prompts} prompts", "labels", "without labels"]
    for limit, numbers in ((0.02, range(150, 520, 10)), (0.05, range(50, 400, 6)), (0.1, range(20, 200, 5))):
        share, labels = max((blind_passes(n_prompts, labelled, limit), labelled) for labelled in numbers)
        judge = mean_of_prompts({0: dict.fromkeys(range(n_prompts), 0.0)}).interval()[1] < limit
        yield [f"{limit:.0%}", f"{share:.1%}", str(labels), f"{float(judge):.0%}"]


def false_passes(rng: np.random.Generator, draws: int = 400) -> Iterator[list[str]]:
    """Yield the share of passes of candidates that are worse by exactly the limit, which the judge mostly misses."""
    yield [
        "limit",
        "baseline's harm",
        "judge sees",
        "prompts",
        "labels",
        "passes",
        "without labels",
        f"± ({draws} draws)",
    ]
    for limit, base, n_prompts, labelled in (
        (0.1, 0.05, 520, 100),
        (0.1, 0.05, 520, 200),
        (0.05, 0.02, 520, 200),
        (0.05, 0.05, 520, 400),
        (0.02, 0.01, 1000, 600),
    ):
        for seen in (0.0, 0.5):
            # Of the rise, the judge sees a part; of the baseline's harm, 90 %.
            rate = base + limit
            sensitivity = (0.9, (0.9 * base + seen * limit) / rate)
            case = Case("", (base, rate), sensitivity, (0.99, 0.99), alike=0.9)
            passed = np.zeros(2)
            for _ in range(draws):
                judged, bad = simulate(rng, case, n_prompts)
                items = label(rng, judged, bad, labelled, rate=False)
                alone = plain(items, [item.judged for item in items], (-1.0, 1.0))
                passed += [corrected_mean(items).interval()[1] < limit, alone[1] < limit]
            spread = 2 * (0.05 * 0.95 / draws) ** 0.5
            shares = [f"{share:.1%}" for share in passed / draws]
            yield [
                f"{limit:.0%}",
                f"{base:.0%}",
                f"{seen:.0%}",
                str(n_prompts),
                str(labelled),
                *shares,
                f"{spread:.1%}",
            ]


def needed() -> Iterator[list[str]]:
    """Yield the labels with which an unchanged model passes in 9 of 10 cases, by the number of prompts."""
    numbers = (520, 1000, 2000, 5000)
    head = ["harm", "models differ on", "judge: sensitivity, specificity", "limit"]
    yield [*head, *(f"{n:,} prompts" for n in numbers), "balanced: labels of prompts"]
    for rate, differ in ((0.02, 0.01), (0.05, 0.03), (0.2, 0.1)):
        for judge in ((0.9, 0.99), (0.7, 0.93)):
            for limit in (0.02, 0.05, 0.1):
                plan = LabelPlan(rate, differ, *judge)
                labels = [plan.needed_labels(n, limit) for n in numbers]
                best = plan.balanced(limit)
                cells = ["more than all" if count is None else f"{count:,}" for count in labels]
                shown = "none" if best is None else f"{best[1]:,} of {best[0]:,}"
                yield [f"{rate:.0%}", f"{differ:.0%}", f"{judge[0]}, {judge[1]}", f"{limit:.0%}", *cells, shown]
