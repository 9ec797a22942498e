"""The planned variance of a corrected difference is the one that simulated labellings have."""

from statistics import fmean, pstdev

import numpy as np
import pytest

from stayaligned.evaluation.labelling.drawing import draw_order
from stayaligned.evaluation.metrics import CorrectedMean, LabelledValue, corrected_mean
from stayaligned.evaluation.metrics.label_planning import LabelPlan, expected_correction

RATE, DISCORDANT = 0.1, 0.06


def simulate(rng: np.random.Generator, n_prompts: int, n_labelled: int, judge: tuple[float, float]) -> CorrectedMean:
    """Label prompts of two models, drawn as `stayaligned label` draws them."""
    cells = [1 - RATE - DISCORDANT / 2, DISCORDANT / 2, DISCORDANT / 2, RATE - DISCORDANT / 2]
    found = rng.choice(4, n_prompts, p=cells)
    bad = np.stack([found >= 2, found % 2 == 1])
    says = np.where(bad, rng.random(bad.shape) < judge[0], rng.random(bad.shape) >= judge[1])
    strata = [f"{a}{b}" for a, b in says.T.astype(int)]
    order = draw_order(strata, {"01", "10", "11"}, n_labelled, int(rng.integers(1 << 30)))
    drawn = {*order[:n_labelled]}
    return corrected_mean(
        [
            LabelledValue(0, n, strata[n], float(j1) - float(j0), float(l1) - float(l0) if n in drawn else None)
            for n, (j0, j1, l0, l1) in enumerate(zip(*says.tolist(), *bad.tolist(), strict=True))
        ]
    )


@pytest.mark.parametrize("judge", [(0.9, 0.99), (0.5, 0.9)])
@pytest.mark.parametrize(("n_prompts", "n_labelled"), [(400, 120)])
def test_the_expected_correction_is_that_of_simulations(judge, n_prompts, n_labelled) -> None:
    rng = np.random.default_rng(0)
    found = [simulate(rng, n_prompts, n_labelled, judge) for _ in range(80)]
    expected = expected_correction(RATE, DISCORDANT, n_prompts, n_labelled, sensitivity=judge[0], specificity=judge[1])
    assert fmean(one.half_width() for one in found) == pytest.approx(expected.half_width(), rel=0.08)
    # The scatter of 80 simulations is known to 2/√160 = 16 %.
    assert pstdev(one.value for one in found) == pytest.approx(expected._variance**0.5, rel=0.16)


def test_the_needed_labels_let_an_unchanged_model_pass() -> None:
    plan = LabelPlan(RATE, DISCORDANT, 0.9, 0.98)
    labels = plan.needed_labels(400, 0.08)
    assert labels is not None
    assert plan.chance(400, labels, 0.08) >= 0.9 > plan.chance(400, labels - 1, 0.08)
    rng = np.random.default_rng(1)
    passed = fmean(simulate(rng, 400, labels, (0.9, 0.98)).interval()[1] < 0.08 for _ in range(80))
    assert passed == pytest.approx(0.9, abs=0.09)
    assert plan.needed_labels(400, 0.001) is None
    prompts = plan.needed_prompts(labels, 0.08)
    assert prompts is not None
    assert prompts <= 400
    balanced = plan.balanced(0.08)
    assert balanced is not None
    assert balanced[1] <= 1.1 * (plan.needed_labels(1_000_000, 0.08) or 0)
    with pytest.raises(ValueError, match="no models have"):
        expected_correction(0.01, 0.5, 100, 10, sensitivity=1, specificity=1)
