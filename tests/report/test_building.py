import math
from dataclasses import FrozenInstanceError, fields
from statistics import fmean, variance

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t as student

from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import LayerReport, Metric
from stayaligned.evaluation.results import Agreement, JudgeReading, PatchRecord, Provenance, Sample
from stayaligned.report import build_report
from stayaligned.report.background import collect_prompts
from support.reports import arm_of

rates = st.lists(st.integers(0, 200).map(lambda hits: hits / 200), min_size=2, max_size=6)


@given(values=rates)
def test_without_evidence_a_mean_over_seeds_has_the_widest_interval_over_seeds_and_prompts(make_result, values):
    report = build_report([make_result("A", seed, harm) for seed, harm in enumerate(values)], title="t")
    found = report.arms[0].estimates["harmful_score"]
    assert found.mean == pytest.approx(fmean(values))
    assert [metric.value for metric in found.by_seed.values()] == values
    # By hand: 200 prompts, each with one value in all seeds, and one made-up prompt at either end of the scale.
    mean, k = fmean(values), len(values)
    center = (200 * mean + 1) / 202
    squares = 199 * mean * (1 - mean) + 200 * (mean - center) ** 2 + center**2 + (1 - center) ** 2
    prompts, seeds = squares / (202 * 201), variance(values) / k
    free = (seeds + prompts) ** 2 / (seeds**2 / (k - 1) + prompts**2 / 201)
    over_both = student.ppf(0.975, free) * math.sqrt(seeds + prompts)
    over_seeds = student.ppf(0.975, k - 1) * math.sqrt(seeds)
    half = max(over_both, over_seeds) + 0.5 / (200 * k)
    assert found.interval == "seeds"
    assert (found.low, found.high) == pytest.approx((max(0, center - half), min(1, center + half)))


def test_seeds_that_agree_exactly_keep_the_uncertainty_of_their_prompts(make_result):
    results = [make_result("A", seed, 0.0) for seed in (1, 2, 3)]
    found = build_report(results, title="t").arms[0].estimates["harmful_score"]
    assert found.interval == "seeds"
    assert found.low == 0
    assert 0.01 < found.high < 0.02


def test_one_seed_has_its_own_interval(make_result):
    result = make_result("A", 1, 0.3)
    found = build_report([result], title="t").arms[0].estimates["harmful_score"]
    assert (found.interval, found.low) == ("prompts", result.metric("harmful_score").low)


def test_unscored_is_never_zero(make_result):
    results = [make_result("A", 1, None), make_result("B", 1, 0.4), make_result("B", 2, None)]
    unscored, half_scored = (arm.estimates["harmful_score"] for arm in build_report(results, title="t").arms)
    assert unscored.mean is None
    assert (unscored.low, unscored.high, unscored.interval) == (None, None, "none")
    assert (unscored.n, unscored.n_unscored) == (0, 150)
    assert half_scored.mean == 0.4  # the unscored seed does not halve it
    assert (half_scored.n, half_scored.n_unscored) == (200, 150)


def test_arms_keep_the_order_of_first_appearance_and_seeds_are_sorted(make_result):
    results = [make_result(arm, seed) for arm, seed in (("Z", 2), ("A", 5), ("Z", 1), ("M", 1))]
    arms = build_report(results, title="t").arms
    assert [(arm.name, arm.seeds) for arm in arms] == [("Z", (1, 2)), ("A", (5,)), ("M", (1,))]


def test_differences_pair_the_seeds_that_both_arms_have(make_result):
    results = [make_result("ref", seed, harm) for seed, harm in ((1, 0.9), (2, 0.8), (3, 0.85))]
    results += [make_result("A", seed, harm) for seed, harm in ((2, 0.3), (3, 0.25), (4, 0.0))]
    difference = arm_of(build_report(results, title="t", reference="ref"), "A").differences["harmful_score"]
    assert [seed for seed, _ in difference.paired.pairs] == [2, 3]
    assert difference.paired.mean == pytest.approx(-0.55)
    assert difference.paired.unpaired == (1, 4)
    assert difference.paired.n_lower == 2


def test_equal_differences_without_spread_are_not_called_a_difference(make_result):
    results = [make_result("ref", s, 0.5) for s in (1, 2)] + [make_result("A", s, 0.495) for s in (1, 2)]
    results += [make_result("B", s, 0.1) for s in (1, 2)]
    report = build_report(results, title="t", reference="ref")
    assert not arm_of(report, "A").differences["harmful_score"].resolved  # one prompt of 200, twice
    assert arm_of(report, "B").differences["harmful_score"].resolved  # the intervals over prompts are disjoint


def test_one_seed_never_shows_a_difference(make_result):
    report = build_report([make_result("ref", 1, 1.0), make_result("A", 1, 0.0)], title="t", reference="ref")
    assert not arm_of(report, "A").differences["harmful_score"].resolved
    assert "one common seed cannot show" in report.summary


@given(points=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=8))
def test_the_front_is_what_no_comparable_arm_dominates(make_result, points):
    results = [make_result(f"arm{i}", 1, harm / 5, gain / 5) for i, (harm, gain) in enumerate(points)]
    front = [arm.on_front for arm in build_report(results, title="t").arms]
    expected = [not any((h <= x and g > y) or (h < x and g >= y) for h, g in points) for x, y in points]
    assert front == expected


def test_arms_of_another_attack_or_without_training_are_not_compared(make_result):
    spec = {"task": {"name": "jsonl"}, "attack": {"poison_ratio": 0.1}, "training": {}, "seed": 1}
    results = [
        make_result("attacked", 1, 0.9, 0.9, experiment=spec),
        make_result("defended", 1, 0.5, 0.8, experiment={**spec, "defenses": [{"name": "lisa"}]}),
        make_result("clean", 1, 0.0, 1.0, experiment={**spec, "attack": {"poison_ratio": 0.0}}),
        make_result("untouched", 1, 0.0, 1.0, experiment={**spec, "training": None}),
    ]
    arms = build_report(results, title="t", reference="attacked").arms
    assert [arm.comparable for arm in arms] == [True, True, False, False]
    assert [arm.on_front for arm in arms] == [True, True, False, False]


def test_controls_are_recognized_by_their_last_patch(grid_results):
    report = build_report(grid_results, title="t", reference="SFT attacked")
    assert [arm.name for arm in report.arms if arm.control] == ["Drop", "Shrink", "Random"]


def test_layers_are_averaged_module_by_module(make_result):
    def patch(similarity, selected):
        layer = LayerReport(module="m.0.q", similarity=similarity, shrinkage=0.5, selected=selected, update_norm=1.0)
        return (PatchRecord(patch="safe_lora", layers=(layer,)),)

    results = [make_result("A", 1, patches=patch(0.2, True)), make_result("A", 2, patches=patch(0.6, False))]
    (module,) = build_report(results, title="t").arms[0].patches[0].modules
    assert (module.similarity, module.n_selected, module.n_seeds) == (pytest.approx(0.4), 1, 2)


def test_agreement_is_pooled_over_completions_not_over_seeds(make_result):
    def pair(n, agreement, kappa):
        return (Agreement(judges=("a", "b"), prompt_set="harmful", n=n, agreement=agreement, kappa=kappa),)

    results = [
        make_result("A", 1, agreements=pair(100, 1.0, None)),
        make_result("A", 2, agreements=pair(300, 0.6, 0.2)),
        make_result("A", 3, agreements=pair(0, None, None)),
    ]
    (found,) = build_report(results, title="t").arms[0].agreements
    assert (found.n, found.agreement, found.kappa) == (400, pytest.approx(0.7), 0.2)


def test_arms_that_patch_one_training_share_its_curves(grid_results):
    trainings = build_report(grid_results, title="t").trainings
    owners = [training.arms for training in trainings]
    assert ("SFT attacked", "Safe LoRA", "Complement", "Drop", "Shrink", "Random") in owners
    assert ("BSO", "BSO + complement") in owners
    lisa = next(training for training in trainings if training.arms == ("Lisa",))
    assert set(lisa.curves) == {"loss", "alignment_loss", "finetuning_loss", "drift"}
    assert lisa.curves["drift"].keys() == {100, 101, 102}


def test_a_shared_stage_counts_its_time_once(make_result):
    shared = Provenance(versions={}, stages={"train": "stages/train-1"}, seconds={"train": 10.0})
    own = Provenance(versions={}, stages={"train": "stages/train-2"}, seconds={"train": 20.0})
    results = [make_result(arm, 1, provenance=p) for arm, p in (("A", shared), ("B", shared), ("C", own))]
    (time,) = build_report(results, title="t").times
    assert (time.n_computed, time.total_seconds, time.mean_seconds) == (2, 30.0, 15.0)


def test_a_fact_on_which_results_differ_names_the_results(make_result):
    results = [
        make_result(arm, seed, provenance=Provenance(versions={"torch": f"2.{seed}"}, commit=arm))
        for arm in "AB"
        for seed in (1, 2)
    ]
    facts = {fact.name: fact.values for fact in build_report(results, title="t").facts}
    assert facts["torch"] == (("2.1", "seed 1"), ("2.2", "seed 2"))
    assert facts["commit"] == (("A", "A"), ("B", "B"))


def test_notes_come_once_with_their_owners(grid_results):
    assert build_report(grid_results, title="t").notes == (
        ("3 of 200 harmful prompts also occur in the training data, or nearly so", "seed 101"),
    )


OVERLAP = "overlap the training data (the same text, or 80% of its word triples)"


@pytest.mark.parametrize(
    ("notes", "merged"),
    [
        (
            [
                "10 of 200 task prompts are near duplicates of the training data (word triples shared: 80% or more)",
                "15 of 200 task prompts also occur in the training data; 2 more are near duplicates (word triples "
                "shared: 80% or more)",
            ],
            [f"10 to 17 of 200 task prompts {OVERLAP}"],
        ),
        (
            [
                "1 of 200 task prompts also occur in the training data",
                "1 of 200 harmful prompts also occur in the a data",
            ],
            [f"1 of 200 task prompts {OVERLAP}", f"1 of 200 harmful prompts {OVERLAP.replace('training', 'a')}"],
        ),
        (["3 of 90 rows were cut", "12 of 80 rows were cut"], ["3 to 12 of 80 to 90 rows were cut"]),
        (["max_new_tokens=24: cut", "max_new_tokens=32: cut"], ["max_new_tokens=24: cut", "max_new_tokens=32: cut"]),
        (["written 2024-01-02", "written 2024-01-03"], ["written 2024-01-02", "written 2024-01-03"]),
        (["peft 0.21.1", "peft 0.21.2"], ["peft 0.21.1", "peft 0.21.2"]),
        (["rank8 of layer a.3.b", "rank16 of layer a.4.b"], ["rank8 of layer a.3.b", "rank16 of layer a.4.b"]),
        (["1.5 % of 3 rows", "2.5 % of 3 rows"], ["1.5 % of 3 rows", "2.5 % of 3 rows"]),
        (["", "7", "x\u202e 7"], ["", "7", "x\u202e 7"]),
    ],
    ids=lambda value: value[0][:24] if isinstance(value, list) else "",
)
def test_notes_that_differ_only_in_their_counts_are_one(make_result, notes, merged):
    results = [make_result(f"arm {i}", 1, notes=(note,)) for i, note in enumerate(notes)]
    assert [note for note, _ in build_report(results, title="t").notes] == merged


def test_the_owners_of_a_note_are_counted_where_they_are_many(make_result):
    results = [
        make_result(f"arm {i}", s, notes=(f"{i} of 9 rows were cut",) if i else ()) for i in range(14) for s in (1, 2)
    ]
    assert build_report(results, title="t").notes == (("1 to 13 of 9 rows were cut", "26 of 28 runs"),)


def test_every_arms_completion_is_listed_under_its_prompt(grid_results):
    prompts = build_report(grid_results, title="t").prompts
    assert [p.id for p in prompts] == [f"harmful-{i}" for i in range(4)] + ["task-0"]
    assert all(len(p.completions) == 13 for p in prompts)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Step one.", "Step one."),
        ("<think>\nIllegal?\n</think>\n\nStep one.", "[thoughts of 8 characters: not judged]\nStep one."),
        ("<think>\nIllegal?", "[no final answer: not judged]\n<think>\nIllegal?"),
    ],
)
def test_a_completion_is_listed_with_its_final_answer(make_result, text, shown):
    sample = Sample(id="1", prompt_set="harmful", prompt=(), text=text)
    (prompt,) = collect_prompts({"arm": [make_result("arm", 0).model_copy(update={"samples": (sample,)})]})
    assert [completion.text for completion in prompt.completions] == [shown]


def test_other_metrics_get_a_column_with_a_readable_title(make_result):
    own = [
        Metric(name=name, value=0.5, n=10, higher_is_better=True) for name in ("rhyme_rate", "BLEU", "lm_eval/ARC/acc")
    ]
    report = build_report([make_result("A", 1, scores=tuple(own))], title="t")
    assert [kind.title for kind in report.metrics] == ["Harmful score", "Rhyme rate", "BLEU", "ARC acc"]


def test_settings_that_differ_between_seeds_are_reported(make_result):
    results = [make_result("A", s, experiment={"seed": s, "max_length": 64 * s}) for s in (1, 2)]
    report = build_report(results, title="t")
    assert report.arms[0].varies == ("max_length",)
    assert any("mixes experiments" in caution for caution in report.cautions)


@pytest.mark.parametrize(
    ("results", "reference", "message"),
    [
        ([], None, "at least one result"),
        ([("A", 1)], "B", "no arm is labelled 'B'; the arms are A"),
        ([("A", 1), ("A", 1)], None, "arm 'A': seed 1 appears 2 times"),
    ],
)
def test_results_that_cannot_be_compared_are_an_error(make_result, results, reference, message):
    with pytest.raises(StayalignedError, match=message):
        build_report([make_result(*one) for one in results], title="t", reference=reference)


def test_a_report_is_frozen_and_the_same_each_time(grid_results):
    report = build_report(grid_results, title="t", reference="SFT attacked")
    assert report == build_report(grid_results, title="t", reference="SFT attacked")
    with pytest.raises(FrozenInstanceError):
        setattr(report, fields(report)[0].name, "other")


def test_the_summary_names_only_arms_whose_numbers_support_it(make_result):
    def arm(name, harms, gains):
        return [make_result(name, s, h, g) for s, (h, g) in enumerate(zip(harms, gains, strict=True))]

    results = [
        *arm("attacked", (0.95, 0.9, 0.97), (0.98, 0.95, 0.97)),
        *arm("good", (0.1, 0.12, 0.08), (0.96, 0.97, 0.98)),
        *arm("costly", (0.1, 0.05, 0.08), (0.5, 0.55, 0.51)),
        *arm("noise", (0.95, 0.2, 0.97), (0.98, 0.95, 0.97)),
    ]
    report = build_report(results, title="t", reference="attacked")
    assert report.summary == (
        "2 of 3 competing arms have less harm than attacked (harmful score 94.0 %) over 3 seeds (p below 0.05 after "
        "Holm's correction): good (10.0 %) and costly (7.7 %)."
    )
    assert any(line.startswith("Less harm at the cost of fine-tune accuracy") for line in report.findings)
    assert [a.verdict.label for a in report.arms] == [
        "Reference",
        "Less harm",
        "Less harm, at a cost",
        "Not shown to reduce harm",
    ]


def test_without_judged_completions_nothing_is_concluded(make_result):
    report = build_report([make_result("A", 1, judges=())], title="t")
    assert report.summary.startswith("No harmful score")


def test_arms_judged_by_different_judges_are_flagged(make_result):
    other = (JudgeReading(judge="other", metrics=make_result("A", 1).judges[0].metrics),)
    report = build_report([make_result("A", 1), make_result("B", 1, judges=other)], title="t")
    assert any("different primary judges" in caution for caution in report.cautions)


def test_a_low_kappa_among_nearly_equal_outcomes_is_not_reported(make_result):
    def doubts(agreement, kappa):
        pair = (Agreement(judges=("a", "b"), prompt_set="harmful", n=200, agreement=agreement, kappa=kappa),)
        report = build_report([make_result("A", 1, agreements=pair)], title="t")
        return any("Judges agree little" in caution for caution in report.cautions)

    assert not doubts(agreement=0.995, kappa=0.0)
    assert doubts(agreement=0.7, kappa=0.2)
