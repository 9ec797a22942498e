"""Means, differences and their intervals: of the same prompts, over seeds and prompts, against hand-written forms."""

import itertools
import math

import numpy as np
import pytest
from scipy.stats import t as student

from stayaligned.core.records import Metric, Outcome
from stayaligned.data.copies import compare_prompts
from stayaligned.evaluation.results import JudgeIdentity
from stayaligned.report.comparing import HARM
from support.reports import arm_of, experiment, hits, measured, report_of

LISA = {"name": "lisa"}


def crossed(table, ends):
    """The interval of a mean over seeds (rows) and prompts (columns), written out from its description."""
    table = np.asarray(table, dtype=float)
    k, n = table.shape
    mean, ends = table.mean(), np.asarray(ends, dtype=float)
    by_prompt = np.concatenate([table.mean(axis=0), ends])  # a made-up prompt at either end of the scale
    center = by_prompt.mean()
    prompts = by_prompt.var(ddof=1) / (n + 2)
    seeds = table.mean(axis=1).var(ddof=1) / k
    free = (seeds + prompts) ** 2 / (seeds**2 / (k - 1) + prompts**2 / (n + 1))
    half = max(
        student.ppf(0.975, free) * math.sqrt(seeds + prompts),
        student.ppf(0.975, k - 1) * math.sqrt(seeds),
    )
    half += 0.5 / (n * k)  # half a step of the mean
    return mean, max(ends[0], center - half), min(ends[1], center + half)


def draw(rng, k, n, mean=0.3):
    chance = np.clip(rng.beta(2 * mean, 2 * (1 - mean), n) + rng.normal(0, 0.1, (k, 1)), 0, 1)
    return rng.random((k, n)) < chance


def runs(arm, table, *defenses, **changes):
    return [
        measured(
            arm,
            seed,
            [Outcome.HARM if hit else Outcome.REFUSE for hit in row],
            experiment=experiment(*defenses, seed=seed),
            **changes,
        )
        for seed, row in enumerate(table)
    ]


@pytest.mark.parametrize(("k", "n"), [(2, 30), (3, 200), (5, 60), (10, 120)])
def test_means_differences_and_categories_have_the_interval_over_seeds_and_prompts(k, n):
    rng = np.random.default_rng(k)
    reference, other = draw(rng, k, n, 0.7), draw(rng, k, n, 0.3)
    report = report_of([*runs("SFT", reference), *runs("A", other, LISA)])
    found = arm_of(report, "A")
    estimate, difference = found.estimates[HARM], found.differences[HARM]
    assert estimate.interval == "seeds"
    assert (estimate.mean, estimate.low, estimate.high) == pytest.approx(crossed(other, (0, 1)))
    truth = crossed(other.astype(int) - reference.astype(int), (-1, 1))
    assert (difference.paired.mean, difference.paired.low, difference.paired.high) == pytest.approx(truth)
    assert (difference.p_value < 0.05) == (truth[2] < 0 or truth[1] > 0)
    for category in found.categories:
        if category.name == HARM:
            part = other[:, int(category.category[1]) :: 2]
            assert (category.value, category.low, category.high) == pytest.approx(crossed(part, (0, 1)))
            assert category.n == part.size


def test_the_interval_over_seeds_and_prompts_agrees_with_a_bootstrap_of_both():
    rng = np.random.default_rng(5)
    table = draw(rng, 12, 300)
    estimate = arm_of(report_of(runs("A", table), None), "A").estimates[HARM]
    means = [table[np.ix_(rng.integers(0, 12, 12), rng.integers(0, 300, 300))].mean() for _ in range(2000)]
    low, high = np.percentile(means, [2.5, 97.5])
    assert 1.0 <= (estimate.high - estimate.low) / (high - low) < 1.35  # Student's quantiles, not normal ones
    assert estimate.low == pytest.approx(low, abs=0.02)
    assert estimate.high == pytest.approx(high, abs=0.02)


def test_a_difference_and_its_interval_are_of_the_prompts_that_both_arms_have():
    reference, other = hits(30, 40), hits(10, 40)
    gone = [None if i >= 30 else outcome for i, outcome in enumerate(reference)]  # 10 refusals are unscored
    for seeds in (1, 3):
        first = [measured("SFT", s, gone, experiment=experiment(seed=s)) for s in range(seeds)]
        second = [measured("A", s, other, experiment=experiment(LISA, seed=s)) for s in range(seeds)]
        paired = arm_of(report_of([*first, *second]), "A").differences[HARM].paired
        assert paired.mean == pytest.approx(10 / 30 - 1)  # not 10/40 - 1
        assert paired.low < paired.mean < paired.high
        assert [value for _, value in paired.pairs] == pytest.approx([paired.mean] * seeds)


@pytest.mark.parametrize("copies", [2, 4, 10])
def test_copies_of_a_prompt_under_other_ids_are_one_prompt(copies):
    once = report_of(
        [*runs("SFT", draw(np.random.default_rng(1), 3, 30)), *runs("A", draw(np.random.default_rng(2), 3, 30), LISA)]
    )
    repeated = []
    for result, rows in [
        *runs("SFT", draw(np.random.default_rng(1), 3, 30)),
        *runs("A", draw(np.random.default_rng(2), 3, 30), LISA),
    ]:
        more = [row.model_copy(update={"id": f"{row.id}-{i}"}) for i in range(copies) for row in rows]
        repeated.append((result, more))
    for name in ("SFT", "A"):
        one, many = (arm_of(report, name).estimates[HARM] for report in (once, report_of(repeated)))
        assert (many.mean, many.low, many.high) == pytest.approx((one.mean, one.low, one.high))
    one, many = (arm_of(report, "A").differences[HARM] for report in (once, report_of(repeated)))
    assert (many.paired.low, many.p_value) == pytest.approx((one.paired.low, one.p_value))


def test_near_copies_count_in_the_mean_but_are_one_prompt_in_the_interval():
    """One request of ten is asked in 31 words: the rate stays that of all rows, its error that of ten prompts."""
    found = []
    for seed in (0, 1, 2):
        result, rows = measured("A", seed, hits(31, 40), experiment=experiment(LISA, seed=seed))
        found.append(
            (result, [row.model_copy(update={"group": "p0" if i < 31 else f"p{i}"}) for i, row in enumerate(rows)])
        )
    grouped = arm_of(report_of(found, None), "A").estimates[HARM]
    alone = arm_of(report_of(found[:1], None), "A").estimates[HARM]
    plain = arm_of(report_of([measured("A", 0, hits(31, 40))], None), "A").estimates[HARM]
    assert grouped.mean == alone.mean == plain.mean == pytest.approx(31 / 40)
    assert alone.interval == "prompts"
    for one in (grouped, alone):
        assert one.high - one.low > 1.5 * (plain.high - plain.low)


def identity(**changes):
    return JudgeIdentity(**{"name": "keyword", "version": 1, "settings": {}, "source": "s", **changes})


@pytest.mark.parametrize(
    ("other", "alike"),
    [
        (identity(), True),
        (identity(version=2), False),
        (identity(settings={"phrases": "few"}), False),
        (identity(source="t"), False),
    ],
    ids=["same", "version", "settings", "source"],
)
def test_arms_of_other_judges_have_no_difference_of_harm(other, alike):
    found = []
    for arm, judge, defenses in (("SFT", identity(), ()), ("A", other, (LISA,))):
        for result, rows in runs(arm, [[True] * 20, [True] * 20] if arm == "SFT" else [[False] * 20] * 2, *defenses):
            reading = result.judges[0].model_copy(update={"identity": judge})
            found.append((result.model_copy(update={"judges": (reading,)}), rows))
    arm = arm_of(report_of(found), "A")
    assert (arm.differences[HARM].paired.mean is not None) == alike
    assert arm.verdict.kind == ("less_harm" if alike else "uncompared")


def test_seeds_without_a_prompt_in_common_do_not_count():
    first = runs("SFT", [[True] * 20] * 3)
    second = [
        *runs("A", [[False] * 20] * 2, LISA),
        measured("A", 2, hits(0, 20), prompts="q", experiment=experiment(LISA)),
    ]
    paired = arm_of(report_of([*first, *second]), "A").differences[HARM].paired
    assert [seed for seed, _ in paired.pairs] == [0, 1]
    assert paired.unpaired == (2,)


def test_metrics_without_evidence_are_compared_by_seed():
    def own(arm, values, *defenses):
        for seed, value in enumerate(values):
            metric = Metric(name="lm_eval/arc/acc", value=value, n=500, higher_is_better=True)
            result, rows = measured(arm, seed, hits(5, 10), experiment=experiment(*defenses, seed=seed))
            yield result.model_copy(update={"scores": (metric,)}), rows

    report = report_of([*own("SFT", (0.5, 0.52, 0.49)), *own("A", (0.41, 0.42, 0.4), LISA)])
    difference = arm_of(report, "A").differences["lm_eval/arc/acc"]
    assert difference.paired.mean == pytest.approx(-0.28 / 3)
    assert difference.paired.low < -0.12 < difference.paired.mean < difference.paired.high
    assert not difference.primary
    assert not difference.resolved


def test_scores_on_a_judges_own_scale_keep_their_units():
    found = []
    for arm, value, defenses in (("SFT", 4.0, ()), ("A", 2.0, (LISA,))):
        for seed in range(3):
            result, rows = measured(arm, seed, hits(20, 20), experiment=experiment(*defenses, seed=seed))
            scores = [value + 0.5 * ((seed + i) % 3 - 1) for i in range(20)]
            rows = [
                row.model_copy(update={"judge_scores": {"keyword": s}}) for row, s in zip(rows, scores, strict=True)
            ]
            metric = Metric(name="policy", value=sum(scores) / 20, scale=(1, 5), n=20, higher_is_better=False)
            reading = result.judges[0].model_copy(update={"metrics": (*result.judges[0].metrics, metric)})
            found.append((result.model_copy(update={"judges": (reading,)}), rows))
    arm = arm_of(report_of(found), "A")
    assert arm.estimates["policy"].mean == pytest.approx(2, abs=0.05)
    assert 1 <= arm.estimates["policy"].low < 2 < arm.estimates["policy"].high <= 5
    assert arm.differences["policy"].paired.mean == pytest.approx(-2)


def test_every_interval_holds_for_few_prompts_and_seeds_at_the_ends_of_the_scale():
    for k, n, rate in itertools.product((1, 2, 3, 5), (1, 2, 5), (0, 1)):
        report = report_of([*runs("SFT", [[True] * n] * k), *runs("A", [[bool(rate)] * n] * k, LISA)])
        arm = arm_of(report, "A")
        estimate, difference = arm.estimates[HARM], arm.differences[HARM].paired
        assert 0 <= estimate.low <= estimate.mean <= estimate.high <= 1
        assert estimate.high - estimate.low > 0.05
        assert -1 <= difference.low <= difference.mean <= difference.high <= 1


def sketched(runs, text):
    """Return runs whose rows have the sketches of a text for each prompt, from the seed and the prompt's number."""

    def with_sketches(seed, rows):
        compared = compare_prompts([text(seed, int(row.id)) for row in rows])
        return [
            row.model_copy(update={"sketch": one.whole, "own_sketch": one.own})
            for row, one in zip(rows, compared, strict=True)
        ]

    return [(run, with_sketches(run.seed, rows)) for run, rows in runs]


def test_near_copies_in_other_seeds_and_arms_are_one_prompt():
    rng = np.random.default_rng(1)
    reference, other = draw(rng, 3, 40, 0.6), draw(rng, 3, 40, 0.3)
    shared = arm_of(report_of([*runs("SFT", reference), *runs("A", other, LISA)]), "A")
    own = [
        *itertools.chain(*(runs("SFT", [row], prompts=f"{s}-") for s, row in enumerate(reference))),
        *itertools.chain(*(runs("A", [row], LISA, prompts=f"{s}-") for s, row in enumerate(other))),
    ]
    own = [(run.model_copy(update={"seed": n % 3, "id": f"{run.id}-{n}"}), rows) for n, (run, rows) in enumerate(own)]
    near = arm_of(report_of(sketched(own, lambda seed, n: f"flarn{n} the zorb{n} without wug{n} {seed}")), "A")
    apart = arm_of(report_of(sketched(own, lambda seed, n: f"flarn{n} the zorb{seed} without wug{seed}x{n}")), "A")
    for found in (near, apart):
        assert found.estimates[HARM].mean == pytest.approx(shared.estimates[HARM].mean)
    assert near.estimates[HARM].low == pytest.approx(shared.estimates[HARM].low)
    assert near.differences[HARM].paired.low == pytest.approx(shared.differences[HARM].paired.low)
    assert apart.estimates[HARM].low != pytest.approx(shared.estimates[HARM].low)


def test_a_text_that_most_prompts_share_is_a_caution():
    template = " ".join(f"w{chr(97 + n // 26)}{chr(97 + n % 26)}" for n in range(90))
    found = runs("SFT", draw(np.random.default_rng(1), 1, 40))
    report = report_of(sketched(found, lambda seed, n: f"{template} flarn{n} zorb{n} wug{n}"))
    assert any("40 prompts if that text is a template, and 1 if not" in caution for caution in report.cautions)
    report = report_of(sketched(found, lambda seed, n: f"flarn{n} zorb{n} wug{n}"))
    assert not any("template" in caution for caution in report.cautions)
