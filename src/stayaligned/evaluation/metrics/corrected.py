"""Means of a judge's values corrected by people's labels of a stratified sample, with the error of both.

Labels are given to items drawn at random within strata, as `stayaligned label` draws them. In stratum h with N_h items,
of which n_h are labelled, a label ℓ is adjusted by what the judge says of the rest: e = ℓ - λ·(d - D_h), where d is the
judge's value and D_h its mean over the stratum. The estimate is Σ A_h·mean(e), where A_h is the stratum's share of all
items. It equals λ·mean(d) + mean(w·(ℓ - λ·d)) with design weights w = N_h/n_h: prediction-powered inference
(Angelopoulos et al., Science 382:669, 2023) in the form of the combined regression estimator of stratified sampling
(Cochran, Sampling Techniques, 3rd ed. 1977, section 7.10). Where each stratum is one pattern of the judge's verdicts,
every λ gives this estimate, and the strata alone are the correction.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any, NamedTuple, Self

from stayaligned.evaluation.metrics.paired import MeanOfPrompts, mean_of_prompts


class LabelledValue(NamedTuple):
    """The values of one item: a prompt of one seed with its completions."""

    seed: int
    prompt: Hashable
    """What identifies the prompt: equal for copies of it, and for the same prompt in other seeds."""
    stratum: str
    judged: float
    """The value by the judge's verdicts; 0 for an unscored one."""
    label: float | None
    """The value by people's labels; None if the item was not drawn, or its labels give no outcome."""


@dataclass(frozen=True)
class CorrectedMean(MeanOfPrompts):
    """A mean over prompts that is estimated from labels of a sample of them, with the error of the sample.

    The error of a mean over prompts (see `MeanOfPrompts`) and that of the sample add up. One pair of pseudo-labels, one
    at each end of the scale, is shared out among the strata by their size: a few labels that confirm the judge do not
    show that it never errs. Half a step of the coarsest stratum is added on either side.
    """

    label_variance: float = 0.0
    """Variance of the estimate by the draw of the labelled items; 0 if all are labelled."""
    label_freedom: float = 1.0
    """Satterthwaite's degrees of freedom of `label_variance`."""
    draw_variance: float = 0.0
    """The same without the pseudo-labels."""
    shift: float = 0.0
    """How far the pseudo-labels move the middle of the interval."""
    unseen_variance: float = 0.0
    """Part of `prompt_variance` that is due to the pseudo-labels."""
    n_labelled: int = 0
    """Number of labelled items."""
    n_items: int = 0
    """Number of items that they were drawn from."""
    judge_weight: float = 1.0
    """λ, the weight of the judge's values within the strata, from 0 to 1; 1 if they do not vary there."""
    uncorrected: float = 0.0
    """Mean of the judge's values."""

    @property
    def center(self) -> float:
        """The middle of the interval: the mean including pseudo-prompts and pseudo-labels."""
        return super().center + self.shift

    @property
    def _between_seeds(self) -> float:
        """Variance of the mean over the seeds, as far as the draw does not explain it."""
        return max(0.0, self.seed_variance / self.n_seeds - self.draw_variance) if self.n_seeds > 1 else 0.0

    @property
    def _errors(self) -> list[tuple[float, float]]:
        parts = [(self._prompt_error**2, self.n_prompts + 1.0), (self.label_variance, self.label_freedom)]
        if self.n_seeds > 1 and self.shared:
            parts.append((self._between_seeds, self.n_seeds - 1.0))
        total = math.fsum(part for part, _ in parts)
        both = math.sqrt(total), total**2 / math.fsum(part**2 / free for part, free in parts)
        alone = math.sqrt(self.seed_variance / self.n_seeds), self.n_seeds - 1.0
        return [both] if self.n_seeds < 2 else [alone, both]

    @property
    def _variance(self) -> float:
        n = self.n_prompts
        own = self.prompt_variance / n if self.shared or self.n_seeds < 2 else 0.0
        return self._between_seeds + own * (n / (n + 2)) ** 2 + self.draw_variance

    def mirrored(self) -> Self:
        """Return the mean of the values with the opposite sign."""
        least, most = self.ends
        return replace(self, value=-self.value, ends=(-most, -least), shift=-self.shift, uncorrected=-self.uncorrected)

    def relabelled(self, n_labelled: int) -> Self:
        """Return the expected mean and variances with labels of another number of the items.

        One pseudo-label of the pair is counted as observed: a few labels that confirm the judge do not show that it
        never errs.
        """
        rest = (self.n_items - n_labelled) / max(1, self.n_items - self.n_labelled)
        return self._with_labels(n_labelled, rest)

    def _with_labels(self, n_labelled: int, rest: float) -> Self:
        """Return the same for another number of labels, if the share of items without a label is `rest` times as large.

        The variance of what was observed falls with the number of labels, that of pseudo-labels with its square.
        """
        more = n_labelled / self.n_labelled
        unseen = max(0.0, self.label_variance - self.draw_variance) / 2
        draw = (self.draw_variance + unseen) / more * rest
        return replace(
            self,
            prompt_variance=self.prompt_variance - self.unseen_variance * (1 - rest / more),
            unseen_variance=self.unseen_variance * rest / more,
            label_variance=draw + unseen / more**2 * rest,
            draw_variance=draw,
            label_freedom=self.label_freedom * more,
            shift=self.shift / more * rest,
            n_labelled=n_labelled,
            seed_variance=self.n_seeds * (self._between_seeds + draw),
            step=max(1 / self.n_items, self.step / more) if self.step else 0.0,
        )

    def resized(self, n_prompts: int) -> Self:
        """Return the expected mean and variances for another number of similar prompts, the same share labelled."""
        more = n_prompts / self.n_prompts
        labelled = self._with_labels(max(1, round(self.n_labelled * more)), 1.0)
        resized = super(CorrectedMean, labelled).resized(n_prompts)
        return replace(resized, n_items=round(self.n_items * more), step=labelled.step)

    def labels_to_decide(self, limit: float, *, power: float = 0.8, confidence: float = 0.95) -> int | None:
        """Return the number of labelled items that puts the interval on one side of `limit` with probability `power`.

        `value` is taken as the true mean. None if labels of all items do not suffice.
        """
        if self.value < limit:
            return self.mirrored().labels_to_decide(-limit, power=power, confidence=confidence)
        low, high = self.n_labelled, self.n_items
        if self.relabelled(high).chance_above(limit, confidence) < power:
            return None
        while high - low > 1:
            middle = (low + high) // 2
            enough = self.relabelled(middle).chance_above(limit, confidence) >= power
            low, high = (low, middle) if enough else (middle, high)
        return high


def corrected_mean(items: Sequence[LabelledValue], *, ends: tuple[float, float] = (-1.0, 1.0)) -> CorrectedMean:
    """Estimate the mean of what people would say of all items from labels of some, drawn at random in each stratum.

    Copies of a prompt under one seed share one weight, and labels of them count as fewer. Prompts and seeds have the
    errors of `mean_of_prompts`, with two differences while labels are missing: the completions of one prompt are taken
    to be as alike as they can be (the case with the largest error), and beside the other errors the spread of the
    seeds' means counts as far as the draw does not explain it. With labels of all items, the result is that of
    `mean_of_prompts`.

    Args:
        items: All items of the frame, labelled or not.
        ends: Lowest and highest possible value.

    Raises:
        ValueError: if there is no item, no label in a stratum, or a value outside the scale.
    """
    values = [value for item in items for value in (item.judged, item.label) if value is not None]
    if not all(ends[0] <= value <= ends[1] for value in values):
        raise ValueError(f"found a value that is not on the scale from {ends[0]:g} to {ends[1]:g}")
    sample = _Sample(items)
    complete = all(item.label is not None for item in items)
    base = _mean_of_labels(items, ends) if complete else sample.mean_of_prompts(items, ends)
    variance, freedom, shift = sample.label_error(ends)
    return CorrectedMean(
        **asdict(base),
        label_variance=variance,
        label_freedom=freedom,
        draw_variance=sample.draw_variance(),
        shift=shift,
        unseen_variance=0.0 if complete else base.prompt_variance * sample.unseen_share(ends),
        n_labelled=sum(item.label is not None for item in items),
        n_items=len(items),
        judge_weight=sample.judge_weight,
        uncorrected=sample.uncorrected,
    )


def _mean_of_labels(items: Sequence[LabelledValue], ends: tuple[float, float]) -> MeanOfPrompts:
    """Return the plain mean of the labels of all items."""
    cells: dict[int, dict[Hashable, list[float]]] = {}
    for item in items:
        if item.label is not None:
            cells.setdefault(item.seed, {}).setdefault(item.prompt, []).append(item.label)
    means = {seed: {prompt: fmean(copies) for prompt, copies in found.items()} for seed, found in cells.items()}
    return mean_of_prompts(means, ends=ends)


def label_error(
    shares: Any, rest: Any, n: Any, means: Any, squares: Any, ends: tuple[float, float]
) -> tuple[float, float, float]:
    """Return variance and degrees of freedom by the draw, and the shift of the middle by the pseudo-labels.

    Args:
        shares: Share of the items in each stratum; arrays, as all but the ends.
        rest: Share of each stratum's items that is not labelled.
        n: Number of labelled items of each stratum.
        means: Mean of its labels.
        squares: Sum of the squares of their residuals.
        ends: Lowest and highest possible value.
    """
    centers = (n * means + shares * sum(ends)) / (n + 2 * shares)
    squares = squares + n * (means - centers) ** 2 + shares * sum((end - centers) ** 2 for end in ends)
    free = n + 2 * shares - 1
    variances = shares**2 * rest * squares / ((n + 2 * shares) * free)
    total, parts = float(variances.sum()), float((variances**2 / free).sum())
    return total, total**2 / parts if parts > 0 else 1.0, float((shares * rest * (centers - means)).sum())


def label_spread(shares: Any, rest: Any, n: Any, squares: Any, value: float, ends: tuple[float, float]) -> float:
    """Return the variance of one label, with pseudo-labels for the items that are not labelled.

    With it, the interval from n labels of which the judge tells nothing is that of n prompts, however many there are.

    Args:
        shares: Share of the items in each stratum; arrays, as `rest`, `n` and `squares`.
        rest: Share of each stratum's items that is not labelled.
        n: Number of labelled items of each stratum.
        squares: Mean of the squared differences of its labels to the value.
        value: Mean of the labels of all items.
        ends: Lowest and highest possible value.
    """
    pseudo = shares * rest
    extra = pseudo * sum((end - value) ** 2 for end in ends)
    return float((shares * (n * squares + extra) / (n + 2 * pseudo)).sum())


class _Sample:
    """The labelled items as arrays: of all items, or of the strata."""

    def __init__(self, items: Sequence[LabelledValue]) -> None:
        import numpy as np

        copies = Counter((item.seed, item.prompt) for item in items)
        numbers = {name: number for number, name in enumerate(dict.fromkeys(item.stratum for item in items))}
        self.n_cells = len(copies)
        self.stratum = np.array([numbers[item.stratum] for item in items], dtype=int)
        self.share = np.array([1 / (len(copies) * copies[item.seed, item.prompt]) for item in items])
        """Share of each item in the mean."""
        self.drawn = np.array([item.label is not None for item in items], dtype=float)
        self.label = np.array([item.label or 0.0 for item in items])
        judged = np.array([item.judged for item in items])
        self.size, self.n = self.sums(np.ones(len(items))), self.sums(self.drawn)
        if not len(items) or not self.n.all():
            raise ValueError("cannot correct: there are no items, or a stratum has no label")
        self.shares = self.sums(self.share)
        """A_h."""
        self.rest = 1 - self.n / self.size
        """Share of the items of each stratum that is not labelled."""
        self.relative = self.share * (self.size / self.shares)[self.stratum]
        """Share of each item, relative to the others of its stratum."""
        self.uncorrected = float((self.share * judged).sum())
        self.judge_weight = self._judge_weight(judged)
        off = judged - (self.sums(self.share * judged) / self.shares)[self.stratum]
        self.adjusted = self.label - self.judge_weight * off
        self.means = self.drawn_means(self.adjusted)
        self.effective = self._effective()
        """Number of labels of each stratum, as many as equal shares would need for the same error."""
        self.residuals = self.drawn * self.relative * (self.adjusted - self.means[self.stratum])

    def sums(self, values: Any) -> Any:
        """Return the sums of an array of all items by stratum."""
        import numpy as np

        return np.bincount(self.stratum, values)

    def drawn_means(self, values: Any) -> Any:
        """Return the means over the labelled items by stratum."""
        return self.sums(self.drawn * self.share * values) / self.sums(self.drawn * self.share)

    def _effective(self) -> Any:
        """Return n_h·(Σa)²/(N_h·Σa²) of the shares a (Kish 1965), or the same of the labelled items if it is less.

        Without it, labels of many copies of one prompt would stand for prompts of which few have a label.
        """
        import numpy as np

        def kish(shares: Any) -> Any:
            return self.sums(shares) ** 2 / self.sums(shares**2)

        return np.maximum(1.0, np.minimum(kish(self.drawn * self.share), self.n / self.size * kish(self.share)))

    def squares(self) -> Any:
        """Return the sum of the squared residuals of each stratum, for as many labels as are effective."""
        return self.sums(self.residuals**2) * (self.effective / self.n) ** 2

    def _judge_weight(self, judged: Any) -> float:
        """Return λ with the least variance of the draw: 1 if the judge's values do not vary within the strata."""
        ours, theirs = (
            self.drawn * self.relative * (values - self.drawn_means(values)[self.stratum])
            for values in (self.label, judged)
        )
        weights = (self.rest * (self.shares / self.n) ** 2)[self.stratum]
        top, bottom = float((weights * ours * theirs).sum()), float((weights * theirs**2).sum())
        return min(1.0, max(0.0, top / bottom)) if bottom > 1e-12 else 1.0

    def label_error(self, ends: tuple[float, float]) -> tuple[float, float, float]:
        """Return variance and degrees of freedom by the draw, and the shift of the middle by the pseudo-labels."""
        return label_error(self.shares, self.rest, self.effective, self.means, self.squares(), ends)

    def draw_variance(self) -> float:
        """Return the variance by the draw without pseudo-labels; a stratum with a single label adds nothing to it."""
        import numpy as np

        squares = self.squares() / (self.effective * np.maximum(1, self.effective - 1))
        return float((self.shares**2 * self.rest * squares).sum())

    def spreads(self, value: float, ends: tuple[float, float]) -> tuple[float, float]:
        """Return the variance of one label around a value, as observed and with pseudo-labels."""
        squares = self.drawn_means((self.label - value) ** 2)
        observed = float((self.shares * squares).sum())
        return observed, label_spread(self.shares, self.rest, self.effective, squares, value, ends)

    def unseen_share(self, ends: tuple[float, float]) -> float:
        """Return the share of the variance of one label that is due to pseudo-labels."""
        observed, spread = self.spreads(float((self.shares * self.means).sum()), ends)
        return max(0.0, 1 - observed / spread) if spread > 0 else 0.0

    def mean_of_prompts(self, items: Sequence[LabelledValue], ends: tuple[float, float]) -> MeanOfPrompts:
        """Estimate the mean with its errors over prompts and seeds."""
        import numpy as np

        value = float((self.shares * self.means).sum())
        _, spread = self.spreads(value, ends)
        counts = Counter(prompt for _, prompt in {(item.seed, item.prompt) for item in items})
        n, each = len(counts), self.n_cells / len(counts)
        crowding = math.fsum((count / each) ** 2 for count in counts.values()) / n
        seeds, seed = np.unique([item.seed for item in items], return_inverse=True)
        between = 0.0
        if len(seeds) > 1:
            filled = self.means[self.stratum] + self.drawn * (self.size / self.n)[self.stratum] * (
                self.adjusted - self.means[self.stratum]
            )
            means = np.bincount(seed, self.share * filled) / np.bincount(seed, self.share)
            between = float(means.var(ddof=1))
        whole = bool(np.equal(self.label % 1, 0).all())
        return MeanOfPrompts(
            value=value,
            n_prompts=n,
            prompt_variance=spread * crowding * n / max(1, n - 1),
            n_seeds=len(seeds),
            seed_variance=between,
            shared=self.n_cells > n,
            step=max(1 / self.n_cells, float((self.shares / self.n).max())) if whole else 0.0,
            ends=ends,
            within_variance=spread if len(seeds) > 1 else 0.0,
        )
