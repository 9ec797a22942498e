"""How many labels, of how many prompts, decide by means that are corrected by labels."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import Any

from stayaligned.evaluation.metrics.corrected import CorrectedMean, label_error, label_spread
from stayaligned.evaluation.metrics.planning import smallest_limit

_MANY = 1_000_000
"""A number of prompts with which only the labels limit what is shown."""

_LEAST = 5
"""Number of labels that a stratum gets at least, if it has as many items, and the drawing does so."""


def expected_correction(
    rate: float,
    discordant: float,
    n_prompts: int,
    n_labelled: int,
    *,
    sensitivity: float,
    specificity: float,
    difference: float = 0.0,
) -> CorrectedMean:
    """Return the expected corrected difference of two models, with its variances, under the draw of `label`.

    Both models are judged equally well, with errors that are independent of each other.

    Args:
        rate: Share of prompts on which the first model does harm, by people.
        discordant: Share of prompts on which the models differ, by people; at least the difference.
        n_prompts: Number of prompts.
        n_labelled: Number of labelled prompts.
        sensitivity: Share of harm that the judge calls harm.
        specificity: Share of the rest that it does not call harm.
        difference: Difference of the two rates.

    Raises:
        ValueError: If no two models have these rates and this share of prompts on which they differ.
    """
    import numpy as np

    more, less = (discordant + difference) / 2, (discordant - difference) / 2
    cells = np.array([[1 - rate - more, more], [less, rate - less]])
    if cells.min() < -1e-9 or not 1 <= n_labelled <= n_prompts:
        raise ValueError(f"no models have a rate of {rate:g} and differ on {discordant:g} by {difference:g}")
    says = np.array([[specificity, 1 - specificity], [1 - sensitivity, sensitivity]])
    # Joint probability of what people say (a, b) and what the judge says (j, k) about both models.
    joint = np.einsum("ab,aj,bk->jkab", np.clip(cells, 0, 1), says, says).reshape(4, 4)
    values = np.array([0.0, 1.0, -1.0, 0.0])
    doubled = np.array([1, 2, 2, 2])[joint.sum(1) > 0]
    joint = joint[joint.sum(1) > 0]
    shares = joint.sum(1)
    n = _allocate(shares * n_prompts, doubled, n_labelled)
    means = joint @ values / shares
    spread = joint @ values**2 / shares - means**2
    rest = np.maximum(0.0, 1 - n / (shares * n_prompts))
    variance, freedom, shift = label_error(shares, rest, n, means, (n - 1).clip(0) * spread, (-1.0, 1.0))
    return CorrectedMean(
        value=difference,
        n_prompts=n_prompts,
        prompt_variance=label_spread(
            shares, rest, n, joint @ (values - difference) ** 2 / shares, difference, (-1.0, 1.0)
        ),
        step=max(1 / n_prompts, float((shares / n).max())),
        label_variance=variance,
        label_freedom=freedom,
        draw_variance=float((shares**2 * rest * spread / n).sum()),
        shift=shift,
        n_labelled=n_labelled,
        n_items=n_prompts,
    )


def _allocate(sizes: Any, doubled: Any, wanted: int) -> Any:
    """Return the expected number of labels of each stratum: in proportion to its size, at least a few, at most all."""
    import numpy as np

    least = np.minimum(np.minimum(sizes, _LEAST), wanted / len(sizes))
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        fits = np.clip(middle * sizes * doubled, least, sizes).sum() <= wanted
        low, high = (middle, high) if fits else (low, middle)
    return np.maximum(np.clip(low * sizes * doubled, least, sizes), 1e-9)


@dataclass(frozen=True)
class LabelPlan:
    """What labels and prompts show about a model that is not worse, by the interval of `corrected_mean`.

    Probabilities are normal approximations with the variances that the interval has on average.
    """

    rate: float
    """Share of prompts on which both models do harm, by people."""
    discordant: float
    """Share of prompts on which they differ, by people."""
    sensitivity: float
    """Share of harm that the judge calls harm."""
    specificity: float
    """Share of the rest that it does not call harm."""
    confidence: float = 0.95
    """Confidence level of the interval."""
    power: float = 0.9
    """Wanted probability that the model passes."""

    def chance(self, n_prompts: int, n_labelled: int, limit: float) -> float:
        """Return the probability that the interval of an unchanged model lies below a limit."""
        expected = expected_correction(
            self.rate,
            self.discordant,
            n_prompts,
            n_labelled,
            sensitivity=self.sensitivity,
            specificity=self.specificity,
        )
        return expected.mirrored().chance_above(-limit, self.confidence)

    def needed_labels(self, n_prompts: int, limit: float) -> int | None:
        """Return the labelled prompts, of n, with which the model passes; None if labels of all are too few."""
        if self.chance(n_prompts, n_prompts, limit) < self.power:
            return None
        return 1 + bisect_left(range(1, n_prompts), True, key=lambda n: self.chance(n_prompts, n, limit) >= self.power)

    def needed_prompts(self, n_labelled: int, limit: float) -> int | None:
        """Return the prompts of which so many labels let the model pass; None if no number of prompts is enough."""
        numbers = range(n_labelled, _MANY)
        found = bisect_left(numbers, True, key=lambda n: self.chance(n, n_labelled, limit) >= self.power)
        return numbers[found] if found < len(numbers) else None

    def balanced(self, limit: float) -> tuple[int, int] | None:
        """Return prompts and labels where more prompts save less than a tenth of the labels; None if none suffice."""
        least = self.needed_labels(_MANY, limit)
        if least is None:
            return None
        labels = least * 11 // 10
        prompts = self.needed_prompts(labels, limit)
        return None if prompts is None else (prompts, self.needed_labels(prompts, limit) or labels)

    def smallest_limit(self, n_prompts: int, n_labelled: int) -> float | None:
        """Return the smallest limit, to a hundredth of a point, that the model passes; None if there is none."""
        return smallest_limit(lambda limit: self.chance(n_prompts, n_labelled, limit), power=self.power)
