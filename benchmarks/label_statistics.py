"""Measure the coverage of the intervals of a judge's quality, by simulated labellings with the draw that is used.

    python benchmarks/label_statistics.py

Prints the table of docs/howto/label.md.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterator

import numpy as np

from stayaligned.evaluation.labelling.drawing import draw_order
from stayaligned.evaluation.metrics.judge_quality import LabelledSample

JUDGES = ((0.9, 0.99), (0.7, 0.93), (0.5, 0.8))
"""Sensitivity and specificity of the simulated judges."""


def main() -> None:
    """Print the table."""
    started = time.monotonic()
    for index, row in enumerate(coverage_rows(draws=1000)):
        print("| " + " | ".join(row) + " |")
        if index == 0:
            print("|---" * len(row) + "|")
        sys.stdout.flush()
    print(f"\n{time.monotonic() - started:.0f} s")


def coverage_rows(draws: int) -> Iterator[list[str]]:
    """Yield coverage and mean width of the intervals, for two arms with the same judge.

    `alike` is the share of prompts on which both arms gave the same completion.
    """
    yield [
        "prompts",
        "labelled",
        "base rate",
        "judge",
        "sensitivity: coverage",
        "width",
        "specificity: coverage",
        "width",
    ]
    sizes = ((520, 50, 0.0), (520, 100, 0.0), (520, 200, 0.0), (2000, 100, 0.0), (200, 200, 0.0), (520, 100, 0.8))
    for (prompts, labelled, alike), base_rate, judge in itertools.product(sizes, (0.02, 0.1, 0.5), JUDGES):
        covered, width = coverage(prompts, labelled, base_rate, judge, alike=alike, draws=draws)
        cells = [f"{number:.3f}" for pair in zip(covered, width, strict=True) for number in pair]
        yield [str(prompts), str(labelled), f"{alike:.0%}", f"{base_rate:.0%}", " / ".join(map(str, judge)), *cells]


def coverage(
    prompts: int,
    labelled: int,
    base_rate: float,
    judge: tuple[float, float],
    *,
    arms: int = 2,
    alike: float = 0.0,
    draws: int,
    seed: int = 0,
) -> tuple[list[float], list[float]]:
    """Return the coverage and the mean width of the intervals of sensitivity and specificity.

    Args:
        prompts: number of prompts.
        labelled: number of items that are labelled, in the order of the draw.
        base_rate: share of bad completions.
        judge: sensitivity and specificity.
        arms: number of arms.
        alike: share of prompts on which all arms have the same completion; on others they are independent.
        draws: number of simulated labellings.
        seed: seed of the first simulation.
    """
    found = [
        simulate(prompts, labelled, base_rate, judge, arms, seed + index, alike=alike).quality()
        for index in range(draws)
    ]
    covered, width = [], []
    for truth, rates in zip(judge, zip(*((q.sensitivity, q.specificity) for q in found), strict=True), strict=True):
        known = [(one.low, one.high) for one in rates if one.low is not None and one.high is not None]
        covered.append(float(np.mean([low - 1e-12 <= truth <= high + 1e-12 for low, high in known])))
        width.append(float(np.mean([high - low for low, high in known])))
    return covered, width


def simulate(
    prompts: int,
    labelled: int,
    base_rate: float,
    judge: tuple[float, float],
    arms: int,
    seed: int,
    *,
    alike: float = 0.0,
) -> LabelledSample:
    """Return a simulated labelling; see `coverage` for the arguments."""
    rng, (sensitivity, specificity) = np.random.default_rng([seed, 1]), judge
    bad = rng.random((prompts, arms)) < base_rate
    verdicts = np.where(bad, rng.random(bad.shape) < sensitivity, rng.random(bad.shape) >= specificity)
    same = rng.random(prompts) < alike
    bad[same], verdicts[same] = bad[same, :1], verdicts[same, :1]
    patterns = ["".join("+" if said else "-" for said in row) for row in verdicts]
    order = draw_order(patterns, {one for one in patterns if "+" in one}, labelled, seed)
    drawn = np.isin(np.arange(prompts), order[:labelled])
    return LabelledSample(
        stratum=np.unique(patterns, return_inverse=True)[1],
        prompt=np.arange(prompts),
        labelled=drawn,
        verdicts=verdicts.astype(float),
        labels=np.where(drawn[:, None], bad, np.nan),
    )


if __name__ == "__main__":
    main()
