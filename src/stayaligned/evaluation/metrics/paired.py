"""Means over prompts, for one or several seeds, with intervals that also hold near the ends of the scale.

The difference of two models on the same prompts is a mean over prompts on the scale from -1 to 1.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist, fmean, variance
from typing import Self, TypeVar

from stayaligned.evaluation.metrics.exact import bounded_interval, bounded_tail
from stayaligned.evaluation.metrics.intervals import Interval

KeyT = TypeVar("KeyT", bound=Hashable)

_MOST_PROMPTS = 10_000_000


@dataclass(frozen=True, slots=True)
class MeanOfPrompts:
    """A mean over prompts with its sampling error over prompts and seeds.

    Two pseudo-prompts, one at each end of the scale, are added to the n prompts (for differences of two models this is
    the interval of Bonett and Price, Statistics in Medicine 31:479, 2012). Unlike theirs, this interval uses Student's
    quantile and adds half a step of the scale on either side, so that it also holds for few prompts and rates near 0.

    Over k seeds, two errors add up: the spread of the seeds' means, and the spread of the prompts that all seeds share.
    The interval is Student's with the error √(e_seeds² + e_prompts²) and Satterthwaite's degrees of freedom, but never
    narrower than Student's over the seeds alone. If each seed has its own prompts, the spread over seeds already
    includes the spread of the prompts.
    """

    value: float
    """The mean."""
    n_prompts: int
    """Number of distinct prompts."""
    prompt_variance: float
    """Variance, over prompts, of a prompt's mean over the seeds."""
    n_seeds: int = 1
    """Number of seeds."""
    seed_variance: float = 0.0
    """Variance, over seeds, of a seed's mean; ignored for one seed."""
    shared: bool = True
    """Whether the seeds answered the same prompts."""
    step: float = 0.0
    """Smallest possible change of the mean: 1/n if every prompt gives a whole number, 0 for graded scores."""
    ends: tuple[float, float] = (-1.0, 1.0)
    """Lowest and highest possible value of one prompt."""
    within_variance: float = 0.0
    """Variance of one value that neither its prompt nor its seed explains."""
    spread: tuple[tuple[float, int], ...] = ()
    """Means of the prompts, each with its number of prompts. If given, bounds are those of `bounded_tail`; over several
    seeds, the wider of these and Student's."""

    @property
    def center(self) -> float:
        """The middle of the interval: the mean including the two pseudo-prompts."""
        return (self.value * self.n_prompts + sum(self.ends)) / (self.n_prompts + 2)

    @property
    def _counted(self) -> tuple[tuple[float, ...], tuple[int, ...]]:
        return tuple(value for value, _ in self.spread), tuple(count for _, count in self.spread)

    @property
    def _prompt_error(self) -> float:
        n, center = self.n_prompts, self.center
        squares = (n - 1) * self.prompt_variance + n * (self.value - center) ** 2
        squares += sum((end - center) ** 2 for end in self.ends)
        return math.sqrt(squares / ((n + 2) * (n + 1)))

    @property
    def _errors(self) -> list[tuple[float, float]]:
        """Standard errors with their degrees of freedom; the widest resulting interval is used."""
        prompts, free = self._prompt_error, self.n_prompts + 1.0
        if self.n_seeds < 2:
            return [(prompts, free)]
        seeds = self.seed_variance / self.n_seeds
        if not self.shared:
            return [(math.sqrt(seeds), self.n_seeds - 1), (prompts, free)]
        both = seeds + prompts**2
        satterthwaite = both**2 / (seeds**2 / (self.n_seeds - 1) + prompts**4 / free)
        return [(math.sqrt(seeds), self.n_seeds - 1), (math.sqrt(both), satterthwaite)]

    @property
    def _variance(self) -> float:
        """Variance of the middle of the interval, if the variances are exact."""
        n = self.n_prompts
        seeds = self.seed_variance / self.n_seeds if self.n_seeds > 1 else 0.0
        own = self.prompt_variance / n if self.shared or self.n_seeds < 2 else 0.0
        return seeds + own * (n / (n + 2)) ** 2

    def half_width(self, confidence: float = 0.95) -> float:
        """Return half the width of the two-sided interval."""
        from scipy.special import stdtrit

        quantiles = (float(stdtrit(free, (1 + confidence) / 2)) * error for error, free in self._errors)
        return max(quantiles) + self.step / 2

    def interval(self, confidence: float = 0.95) -> Interval:
        """Return the two-sided interval, cut to the scale."""
        half, (least, most) = self.half_width(confidence), self.ends
        student = max(least, self.center - half), min(most, self.center + half)
        if not self.spread:
            return student
        low, high = bounded_interval(*self._counted, ends=self.ends, confidence=confidence)
        return (low, high) if self.n_seeds < 2 else (min(low, student[0]), max(high, student[1]))

    def p_above(self, limit: float) -> float:
        """Return the one-sided p-value of "the mean is not above `limit`".

        It is below α exactly if the (1 - 2α) interval lies above `limit`.
        """
        from scipy.special import stdtr

        distance = self.center - self.step / 2 - limit
        student = max(
            float(stdtr(free, -distance / error)) if error > 0 else float(distance <= 0) for error, free in self._errors
        )
        if not self.spread:
            return student
        exact = float(bounded_tail(*self._counted, limit, end=self.ends[0]))
        return exact if self.n_seeds < 2 else max(exact, student)

    def p_value(self, at: float = 0.0) -> float:
        """Return the two-sided p-value of "the mean is `at`".

        It is below α exactly if the (1 - α) interval does not contain `at`.
        """
        return min(1.0, 2 * min(self.p_above(at), self.mirrored().p_above(-at)))

    def mirrored(self) -> Self:
        """Return the mean of the values with the opposite sign."""
        least, most = self.ends
        spread = tuple((-value, count) for value, count in self.spread)
        return replace(self, value=-self.value, ends=(-most, -least), spread=spread)

    def resized(self, n_prompts: int) -> Self:
        """Return the expected mean and variances for another number of similar prompts.

        One of the two pseudo-prompts is counted as observed: a few prompts without any event do not show that there
        are none.
        """
        n, spare = self.n_prompts, sum((end - self.value) ** 2 for end in self.ends) / 2
        spread = ((n - 1) * self.prompt_variance + (spare if self.step else 0.0)) / n
        between = max(0.0, self.seed_variance - self.within_variance / n)
        return replace(
            self,
            spread=(),
            n_prompts=n_prompts,
            prompt_variance=spread,
            seed_variance=between + self.within_variance / n_prompts,
            step=self.step * n / n_prompts,
        )

    def chance_above(self, limit: float, confidence: float = 0.95) -> float:
        """Return the (normal) probability that the interval lies above `limit`, if value and variances are exact."""
        distance = self.center - self.half_width(confidence) - limit
        scatter = math.sqrt(self._variance)
        return NormalDist().cdf(distance / scatter) if scatter > 0 else float(distance > 0)

    def prompts_to_decide(self, limit: float, *, power: float = 0.8, confidence: float = 0.95) -> int | None:
        """Return the number of prompts that puts the interval on one side of `limit` with probability `power`.

        `value` is taken as the true mean. None if no number suffices: the mean is at the limit, or the spread over
        seeds is too large.
        """
        if self.value < limit:
            return self.mirrored().prompts_to_decide(-limit, power=power, confidence=confidence)
        return least_count(lambda n: self.resized(n).chance_above(limit, confidence) >= power)


def least_count(enough: Callable[[int], bool]) -> int | None:
    """Return the least number that is enough, found by bisection; None if ten million are not enough."""
    high = 2
    while not enough(high):
        high *= 2
        if high > _MOST_PROMPTS:
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def mean_of_prompts(
    values: Mapping[int, Mapping[KeyT, float | Sequence[float]]],
    *,
    ends: tuple[float, float] = (-1.0, 1.0),
    exact: bool = False,
) -> MeanOfPrompts:
    """Compute the mean of values given by seed and prompt; seeds may share all, some or no prompts.

    A prompt that was asked several times, as copies or near copies, has several values. All of them count in the mean,
    but for its error they are one prompt. With `exact`, bounds hold without assuming a distribution of the prompts.

    Raises:
        ValueError: If a seed has no value, or a value is outside the scale.
    """
    if not values or not all(values.values()):
        raise ValueError("cannot average: there are no seeds, or a seed has no values")
    cells = [
        (seed, key, [float(found)] if isinstance(found, float | int) else [*map(float, found)])
        for seed, rows in values.items()
        for key, found in rows.items()
    ]
    numbers = [value for _, _, found in cells for value in found]
    if not all(ends[0] <= value <= ends[1] for value in numbers):
        raise ValueError(f"found a value that is not on the scale from {ends[0]:g} to {ends[1]:g}")
    mean = math.fsum(numbers) / len(numbers)
    by_prompt: dict[KeyT, list[float]] = {}
    by_seed: dict[int, list[float]] = {}
    for seed, key, found in cells:
        by_prompt.setdefault(key, []).extend(found)
        by_seed.setdefault(seed, []).extend(found)
    n, each = len(by_prompt), len(numbers) / len(by_prompt)
    off = [(math.fsum(found) - len(found) * mean) / each for found in by_prompt.values()]
    seed_means = {seed: fmean(found) for seed, found in by_seed.items()}
    return MeanOfPrompts(
        value=mean,
        n_prompts=n,
        prompt_variance=math.fsum(x * x for x in off) / max(1, n - 1),
        n_seeds=len(values),
        seed_variance=variance(seed_means.values()) if len(values) > 1 else 0.0,
        shared=len(cells) > n,
        step=1 / len(cells) if all(value.is_integer() for value in numbers) else 0.0,
        ends=ends,
        within_variance=_residual_variance({(s, key): fmean(found) for s, key, found in cells}, seed_means, mean),
        spread=_spread((mean + x for x in off), ends) if exact else (),
    )


def _spread(means: Iterable[float], ends: tuple[float, float]) -> tuple[tuple[float, int], ...]:
    """Count equal means of prompts; one that has more values than others may lie beyond the scale, and is cut."""
    return tuple(sorted(Counter(min(ends[1], max(ends[0], round(value, 9) + 0.0)) for value in means).items()))


def mean_of_seeds(
    means: Mapping[int, float], n_prompts: int, prompt_variance: float, *, ends: tuple[float, float] = (-1.0, 1.0)
) -> MeanOfPrompts:
    """Compute the mean over seeds whose values by prompt are unknown.

    It is taken that all seeds answered the same prompts and gave a prompt the same value, the case with the largest
    error over prompts.

    Args:
        means: Mean of each seed.
        n_prompts: Number of prompts of a seed.
        prompt_variance: Variance of one value over prompts, or an upper bound of it.
        ends: Lowest and highest possible value.
    """
    return MeanOfPrompts(
        value=fmean(means.values()),
        n_prompts=n_prompts,
        prompt_variance=prompt_variance,
        n_seeds=len(means),
        seed_variance=variance(means.values()) if len(means) > 1 else 0.0,
        step=1 / (n_prompts * len(means)),
        ends=ends,
    )


def _residual_variance(cells: Mapping[tuple[int, KeyT], float], seed_means: Mapping[int, float], mean: float) -> float:
    """Compute the variance that prompt and seed do not explain (the seed alone, if no prompt is shared)."""
    by_prompt: dict[KeyT, list[float]] = {}
    for (_, key), value in cells.items():
        by_prompt.setdefault(key, []).append(value)
    shared = {key: fmean(found) - mean for key, found in by_prompt.items() if len(found) > 1}
    left = [value - seed_means[seed] - shared.get(key, 0.0) for (seed, key), value in cells.items()]
    free = len(left) - len(seed_means) - (len(shared) - 1 if shared else 0)
    return math.fsum(x * x for x in left) / free if len(seed_means) > 1 and free > 0 else 0.0
