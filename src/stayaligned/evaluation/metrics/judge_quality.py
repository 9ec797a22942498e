"""How far a judge agrees with people, from labels of a stratified random sample of what it judged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from stayaligned.evaluation.metrics.intervals import Interval

Array = np.ndarray


@dataclass(frozen=True, slots=True)
class QualityRate:
    """A rate of a judge among the completions that people put into one class."""

    value: float | None
    """The rate; None if no completion has a label of that class."""
    low: float | None
    """Lower bound of its interval."""
    high: float | None
    """Upper bound of its interval."""
    n: int
    """Number of labelled completions of that class."""


@dataclass(frozen=True, slots=True)
class JudgeQuality:
    """A judge against people's labels."""

    sensitivity: QualityRate
    """Share of the completions that people call bad which the judge calls bad."""
    specificity: QualityRate
    """Share of the other completions which the judge does not call bad."""
    base_rate: QualityRate
    """Share of bad completions, by people."""
    agreement: float | None
    """Share of the completions on which judge and people agree."""
    kappa: float | None
    """Cohen's κ, which depends on the base rate; None where it is undefined."""
    n: int
    """Number of labelled completions that the judge scored."""
    n_unscored: int
    """Number of labelled completions that the judge did not score."""
    n_unsure: int
    """Number of completions whose labels give no outcome."""


@dataclass(frozen=True)
class LabelledSample:
    """Verdicts on all items of a frame, and people's labels of a random sample of each stratum.

    An item is one prompt of one seed with one completion for each of k arms. All N items are given: the verdicts on
    those without a label tell what the labels stand for.
    """

    stratum: Array
    """Stratum of each item, from 0; shape (N,)."""
    prompt: Array
    """Number of the prompt of each item, from 0: items of several seeds may share prompts; shape (N,)."""
    labelled: Array
    """Whether an item is in the sample; shape (N,). Each stratum has at least one such item."""
    verdicts: Array
    """1 if the judge calls a completion bad, 0 if not, NaN if it is unscored; shape (N, k)."""
    labels: Array
    """1 if people call it bad, 0 if not, NaN if they give no outcome; used only where labelled; shape (N, k)."""

    @cached_property
    def _sizes(self) -> Array:
        return np.bincount(self.stratum)

    @cached_property
    def _drawn(self) -> Array:
        return np.bincount(self.stratum, weights=self.labelled, minlength=len(self._sizes))

    def quality(self, arms: Sequence[int] | None = None, *, confidence: float = 0.95) -> JudgeQuality:
        """Return the judge's quality on some arms; on all if None."""
        chosen = [*range(self.verdicts.shape[1])] if arms is None else [*arms]
        verdicts, labels = self.verdicts[:, chosen], self.labels[:, chosen]
        known = ~np.isnan(labels) & self.labelled[:, None]
        scored = ~np.isnan(verdicts)
        weights = (self._sizes / self._drawn)[self.stratum][:, None]
        both = known & scored
        cells = {
            (said, true): float((weights * (both & (verdicts == said) & (labels == true))).sum())
            for said in (0, 1)
            for true in (0, 1)
        }
        agreement, kappa = _kappa(cells)
        return JudgeQuality(
            sensitivity=self._rate(self._of_class(chosen, 1), confidence),
            specificity=self._rate(self._of_class(chosen, 0), confidence),
            base_rate=self._rate(self._bad(chosen), confidence),
            agreement=agreement,
            kappa=kappa,
            n=int(both.sum()),
            n_unscored=int((known & ~scored).sum()),
            n_unsure=int((np.isnan(labels) & self.labelled[:, None]).sum()),
        )

    def p_equal(self, first: int, second: int, *, bad: bool) -> float | None:
        """Return the two-sided p-value of "the rate is the same on two arms"; None if one has no such completion.

        Args:
            first: one arm.
            second: the other arm.
            bad: whether the rate is the sensitivity, not the specificity.
        """
        ratios = [self._of_class([arm], int(bad)) for arm in (first, second)]
        if not all(one.count for one in ratios):
            return None
        (left, ours), (right, theirs) = (self._smoothed(one) for one in ratios)
        square = self._variance(ours - theirs)
        if square == 0:
            return 1.0 if left == right else 0.0
        return math.erfc(abs(left - right) / math.sqrt(2 * square))

    # ---- ratios ------------------------------------------------------------------------------------------------------

    def _of_class(self, arms: Sequence[int], true: int) -> _Ratio:
        """Return the ratio of the verdicts that agree with people on the completions of one class."""
        verdicts, labels = self.verdicts[:, arms], self.labels[:, arms]
        own = (labels == true) & ~np.isnan(verdicts) & self.labelled[:, None]
        agree = verdicts == true
        all_of_class = np.stack([self._means(agree), self._means(~np.isnan(verdicts))])
        return _Ratio((own & agree).sum(1), own.sum(1), np.stack([all_of_class, np.zeros_like(all_of_class)]))

    def _bad(self, arms: Sequence[int]) -> _Ratio:
        """Return the ratio of bad completions, by people."""
        labels = self.labels[:, arms]
        known = ~np.isnan(labels) & self.labelled[:, None]
        every = np.full(len(self._sizes), float(len(arms)))
        ends = np.stack([np.stack([every, every]), np.stack([0 * every, every])])
        return _Ratio((known & (labels == 1)).sum(1), known.sum(1), ends)

    def _means(self, found: Array) -> Array:
        """Return the mean number of completions of an item in each stratum that have a property."""
        return np.bincount(self.stratum, weights=found.sum(1)) / self._sizes

    def _rate(self, ratio: _Ratio, confidence: float) -> QualityRate:
        """Return a rate with its interval: Clopper-Pearson's of an effective number of completions.

        The effective number is that with which a binomial share has the variance of this rate (Korn and Graubard,
        Survey Methodology 24:193, 1998). It is at most the number that the size of the class is known from, or Kish's:
        where few members of a large stratum belong to the class, the linearized variance is too small. If everything
        is labelled, it is the number of completions of the class (of one arm).
        """
        if not ratio.count:
            return QualityRate(None, None, None, 0)
        weights = (self._sizes / self._drawn)[self.stratum]
        total = float((weights * ratio.under).sum())
        value = float((weights * ratio.over).sum()) / total
        effective = total**2 / float((weights**2 * ratio.under**2).sum())
        smooth, influence = self._smoothed(ratio)
        square = self._variance(influence)
        if square > 0:
            size = np.concatenate([ratio.under, ratio.ends[:, 1].ravel()]) / self._total(ratio.under, ratio.ends[:, 1])
            effective = min(max(effective, 1 / self._variance(size)), smooth * (1 - smooth) / square)
        low, high = _beta_interval(value, effective, confidence)
        return QualityRate(value, low, high, ratio.count)

    def _smoothed(self, ratio: _Ratio) -> tuple[float, Array]:
        """Return the rate and its influence values, with two pseudo-items added to each stratum.

        Items without a label are predicted by the labelled ones of their stratum and by two more: one all of whose
        completions are of the class, and one none of whose are. So no error in a few labels does not mean no errors.

        Returns:
            The rate; and the influence of each item and of both pseudo-items of each stratum, shape (N + 2 S,), zero
            for items without a label.
        """
        over, under = self._total(ratio.over, ratio.ends[:, 0]), self._total(ratio.under, ratio.ends[:, 1])
        value = over / under
        ends = (ratio.ends[:, 0] - value * ratio.ends[:, 1]) / under
        return value, np.concatenate([(ratio.over - value * ratio.under) / under, ends.ravel()])

    def _total(self, values: Array, ends: Array) -> float:
        """Return the total over all items: of the labelled ones, and as predicted for the others."""
        sums = np.bincount(self.stratum, weights=values * self.labelled, minlength=len(self._sizes))
        left = self._sizes - self._drawn
        return float((sums + left * (sums + ends.sum(0)) / (self._drawn + 2)).sum())

    def _variance(self, influence: Array) -> float:
        """Return the variance of a rate: of the prompts of the frame, and of the sample drawn from it.

        Items of several seeds with one prompt count as one for the first.
        """
        n, s = len(self.stratum), len(self._sizes)
        own, ends = influence[:n] * self.labelled, influence[n:].reshape(2, s)
        left = self._sizes - self._drawn
        copies = np.bincount(self.prompt)[self.prompt]
        sums = np.bincount(self.stratum, weights=own, minlength=s)
        squares = np.bincount(self.stratum, weights=own**2, minlength=s)
        repeated = np.bincount(self.stratum, weights=own**2 * copies, minlength=s)
        each = np.bincount(self.stratum, weights=copies) / self._sizes
        count = self._drawn + 2
        mean = (sums + ends.sum(0)) / count
        all_squares = squares + (ends**2).sum(0)
        spread = np.maximum(0.0, all_squares - count * mean**2) / (count - 1)
        of_frame = repeated + left * (repeated + each * (ends**2).sum(0)) / count
        of_sample = self._sizes * left / self._drawn * spread
        return float((of_frame + of_sample).sum())


@dataclass(frozen=True, slots=True)
class _Ratio:
    """A ratio of two totals over completions."""

    over: Array
    """Numerator of each item, zero without a label; shape (N,)."""
    under: Array
    """Denominator of each item, zero without a label; shape (N,)."""
    ends: Array
    """Numerator and denominator of the two pseudo-items of each of S strata; shape (2, 2, S)."""

    @property
    def count(self) -> int:
        """Number of labelled completions that count."""
        return int(self.under.sum())


def _kappa(cells: dict[tuple[int, int], float]) -> tuple[float | None, float | None]:
    """Return agreement and κ of the weighted cells (verdict, label)."""
    total = math.fsum(cells.values())
    if not total:
        return None, None
    equal = (cells[0, 0] + cells[1, 1]) / total
    said, true = (cells[1, 0] + cells[1, 1]) / total, (cells[0, 1] + cells[1, 1]) / total
    chance = said * true + (1 - said) * (1 - true)
    return equal, (equal - chance) / (1 - chance) if chance < 1 else None


def _beta_interval(value: float, effective: float, confidence: float) -> Interval:
    """Return the Clopper-Pearson interval of a share of an effective number of completions."""
    from scipy.special import betaincinv

    tail, hits = (1 - confidence) / 2, value * effective
    low = 0.0 if hits <= 0 else float(betaincinv(hits, effective - hits + 1, tail))
    high = 1.0 if hits >= effective else float(betaincinv(hits + 1, effective - hits, 1 - tail))
    return low, high
