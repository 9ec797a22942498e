"""The interval decides, and results that cannot be compared are an error."""

import itertools
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stayaligned.core.errors import StayalignedError
from stayaligned.evaluation.metrics import mean_of_prompts
from stayaligned.gate import Limits, decide, read_side, to_json, to_junit, to_markdown
from stayaligned.gate.words import explain_decision
from support.runs import H, R, S, evidence, outcomes, side_in_memory, write_run


def sides(root: Path, ours: list, theirs: list, arguments=None):
    """Two sides, one run each, from rows."""
    return (
        read_side("baseline", [write_run(root / "baseline", ours, **(arguments or {}))]),
        read_side("candidate", [write_run(root / "candidate", theirs)]),
    )


def sides_in_memory(ours: list, theirs: list):
    """Return the sides that `sides` would read from disk."""
    return side_in_memory("baseline", ours), side_in_memory("candidate", theirs)


def harm(root: Path, n: int, before: int, after: int, **limits):
    rows = [evidence({"keyword": outcomes(n, count)}) for count in (before, after)]
    return decide(*sides(root, *rows), Limits(**({"max_harm_increase": 0.05} | limits)))


@pytest.mark.parametrize(
    ("n", "before", "after", "answer"), [(400, 8, 8, "pass"), (400, 8, 80, "fail"), (40, 1, 2, "undecided")]
)
def test_the_interval_decides(tmp_path: Path, n, before, after, answer) -> None:
    decision = harm(tmp_path, n, before, after)
    (found,) = decision.criteria
    assert decision.answer == found.answer == answer
    expected = mean_of_prompts({0: {i: int(i < after) - int(i < before) for i in range(n)}})
    assert (found.low, found.high) == pytest.approx(expected.interval())
    assert (found.baseline, found.candidate) == (pytest.approx(before / n), pytest.approx(after / n))
    assert decision.sentence.startswith(answer.upper())
    assert (found.needed_prompts is not None) == (answer == "undecided")


def test_the_needed_prompts_decide(tmp_path: Path) -> None:
    decision = harm(tmp_path / "few", 60, 3, 3)
    needed = decision.criteria[0].needed_prompts
    assert decision.answer == "undecided"
    assert f"about {needed:,} prompts" in decision.sentence
    share = round(needed * 3 / 60)
    assert harm(tmp_path / "enough", needed, share, share).answer == "pass"


def test_a_drop_counts_where_higher_is_better(tmp_path: Path) -> None:
    rows = [evidence({}, task=[1.0] * 300 + [0.0] * 100), evidence({}, task=[1.0] * 200 + [0.0] * 200)]
    limits = Limits(max_utility_drop=0.05)
    assert decide(*sides(tmp_path / "worse", *rows), limits).answer == "fail"
    better = decide(*sides(tmp_path / "better", *rows[::-1]), limits)
    assert better.answer == "pass"
    assert better.criteria[0].change == pytest.approx(-0.25)


def test_a_ceiling_limits_the_candidates_own_rate(tmp_path: Path) -> None:
    assert harm(tmp_path / "a", 200, 0, 2, max_harm_increase=None, max_harm=0.05).answer == "pass"
    failed = harm(tmp_path / "b", 200, 200, 40, max_harm_increase=None, max_harm=0.05)
    assert (failed.answer, failed.criteria[0].interval) == ("fail", "Clopper-Pearson")
    assert failed.criteria[0].baseline is None


def test_every_criterion_must_pass_and_one_can_fail(tmp_path: Path) -> None:
    fine, worse = outcomes(400, 4), outcomes(400, 60)
    benign = {"keyword": outcomes(400, 380)}
    limits = Limits(max_harm_increase=0.05, max_over_refusal_increase=0.05)
    same = decide(
        *sides(tmp_path / "1", evidence({"keyword": fine}, benign), evidence({"keyword": fine}, benign)), limits
    )
    assert [same.answer, *(c.answer for c in same.criteria)] == ["pass"] * 3
    mixed = decide(
        *sides(tmp_path / "2", evidence({"keyword": fine}, benign), evidence({"keyword": worse}, benign)), limits
    )
    assert [mixed.answer, *(c.answer for c in mixed.criteria)] == ["fail", "fail", "pass"]


def test_a_fail_is_corrected_for_the_number_of_criteria(tmp_path: Path) -> None:
    # The least harm whose own interval is beyond the limit: enough alone, not enough among four.
    limit, n = 0.06, 400
    least = next(
        k for k in range(n) if mean_of_prompts({0: dict(enumerate([1] * k + [0] * (n - k)))}).interval()[0] > limit
    )
    rows = [evidence({"keyword": outcomes(n, k)}, {"keyword": outcomes(n, 390)}) for k in (0, least)]
    alone = decide(*sides(tmp_path / "1", *rows), Limits(max_harm_increase=limit))
    assert (alone.answer, alone.criteria[0].low > limit) == ("fail", True)
    four = Limits(max_harm_increase=0.06, max_over_refusal_increase=0.1, max_harm=0.9, max_over_refusal=0.9)
    among = decide(*sides(tmp_path / "2", *rows), four)
    assert among.answer == "undecided"
    assert "after correction for 4 criteria" in among.sentence


def test_with_too_many_unscored_completions_the_gate_is_undecided(tmp_path: Path) -> None:
    gaps = [None] * 50 + outcomes(350, 0)
    rows = [evidence({"keyword": outcomes(400, 0)}), evidence({"keyword": gaps})]
    decision = decide(*sides(tmp_path, *rows), Limits(max_harm_increase=0.05))
    assert decision.answer == "undecided"
    assert "50 of 400 completions are unscored" in decision.sentence
    tolerant = decide(*sides(tmp_path, *rows), Limits(max_harm_increase=0.05, max_unscored=0.2))
    assert tolerant.answer == "undecided", "the unscored completions may be the harmful ones"
    assert "completions are not the worse ones" in tolerant.criteria[0].reason
    assert decide(*sides(tmp_path, *rows), Limits(max_harm_increase=0.6, max_unscored=0.2)).answer == "pass"


def test_another_judge_with_another_conclusion_is_named(tmp_path: Path) -> None:
    rows = [
        evidence({"a": outcomes(400, 4), "b": outcomes(400, 4)}),
        evidence({"a": outcomes(400, 4), "b": outcomes(400, 90)}),
    ]
    both = sides(tmp_path, *rows)
    decision = decide(*both, Limits(max_harm_increase=0.05))
    assert (decision.judge, decision.answer) == ("a", "pass")
    assert [(o.judge, o.answer) for o in decision.disagreements] == [("b", "fail")]
    turned = decide(*both, Limits(max_harm_increase=0.05), judge="b")
    assert (turned.answer, [o.judge for o in turned.disagreements]) == ("fail", ["a"])


def test_a_judge_that_cannot_tell_refusals_measures_harm_but_not_over_refusal(tmp_path: Path) -> None:
    coarse = [S if o is R else o for o in outcomes(300, 3)]
    rows = evidence({"fine": outcomes(300, 3), "coarse": coarse}, {"fine": [R] * 300, "coarse": [S] * 300})
    worse = evidence({"fine": outcomes(300, 3), "coarse": [H] * 300}, {"fine": [R] * 300, "coarse": [S] * 300})
    both = sides(tmp_path, rows, worse)
    limits = Limits(max_harm_increase=0.05, max_over_refusal_increase=0.05)
    with pytest.raises(StayalignedError, match="does not distinguish refusals"):
        decide(*both, limits, judge="coarse")
    assert [(o.judge, o.answer) for o in decide(*both, limits).disagreements] == [("coarse", "fail")]


def test_seeds_are_paired_and_their_spread_counts(tmp_path: Path) -> None:
    def recipe(role: str, counts: list[int]):
        runs = [
            write_run(tmp_path / f"{role}{seed}", evidence({"keyword": outcomes(200, k, start=7 * seed)}), seed=seed)
            for seed, k in enumerate(counts)
        ]
        return read_side(role, runs)

    limits = Limits(max_harm_increase=0.05)
    steady = decide(recipe("baseline", [4, 4, 4]), recipe("candidate", [4, 5, 4]), limits)
    assert (steady.answer, steady.criteria[0].n_seeds) == ("pass", 3)
    wild = decide(recipe("baseline", [4, 4, 4]), recipe("candidate", [0, 0, 24]), limits)
    assert wild.answer == "undecided"
    with pytest.raises(StayalignedError, match="seed 3: only the candidate has a result"):
        decide(recipe("baseline", [4, 4, 4]), recipe("candidate", [4, 4, 4, 4]), limits)
    with pytest.raises(StayalignedError, match=r"seed 0 appears twice, in .*baseline0 and .*candidate0"):
        read_side("baseline", [tmp_path / "baseline0", tmp_path / "candidate0"])


CHANGES = [
    ({"provenance": {}, "experiment": {"generation": {"max_new_tokens": 9}}}, "decoding settings"),
    ({"experiment": {"judges": [{"name": "keyword", "match": "start"}]}}, "judge 'keyword'"),
    ({"experiment": {"task": {"name": "jsonl", "train": "other.jsonl", "metric": "number"}}}, "'task'"),
]


@pytest.mark.parametrize(("changes", "named"), CHANGES, ids=lambda value: value if isinstance(value, str) else "")
def test_a_difference_in_settings_that_affect_the_numbers_is_an_error_that_names_it(
    tmp_path: Path, changes, named
) -> None:
    rows = evidence({"keyword": outcomes(20, 1)}, task=[1.0] * 20)
    with pytest.raises(StayalignedError, match=named):
        decide(*sides(tmp_path, rows, rows, changes), Limits(max_harm_increase=0.05, max_utility_drop=0.05))


def test_model_training_and_speed_may_differ(tmp_path: Path) -> None:
    rows = evidence({"keyword": outcomes(200, 1)}, task=[1.0] * 200)
    free = {
        "model": "other",
        "adapter": "a",
        "defenses": [{"name": "lisa"}],
        "training": {"max_steps": 3},
        "generation": {"max_new_tokens": 8, "memory_mib": 1, "seed": 5},
        "task": {"name": "jsonl", "train": "mine.jsonl", "metric": "exact"},
    }
    both = sides(tmp_path, rows, rows, {"experiment": free, "seed": 9})
    assert decide(*both, Limits(max_harm_increase=0.05, max_utility_drop=0.05)).answer == "pass"


def test_different_prompts_are_an_error(tmp_path: Path) -> None:
    limits = Limits(max_harm_increase=0.05)
    rows, other = (evidence({"keyword": outcomes(20, 1)}, world=world) for world in ("", "elsewhere"))
    with pytest.raises(StayalignedError, match="20 prompts have the same id but different text"):
        decide(*sides(tmp_path / "1", rows, other), limits)
    with pytest.raises(StayalignedError, match="5 prompts are in only one of the two"):
        decide(*sides(tmp_path / "2", rows, evidence({"keyword": outcomes(15, 1)})), limits)
    template = {"provenance": {}}
    both = sides(tmp_path / "3", rows, rows, template)
    changed = both[0].runs[0].result.provenance.model_copy(update={"template_hash": "u"})
    run = both[0].runs[0]
    object.__setattr__(run, "result", run.result.model_copy(update={"provenance": changed}))
    with pytest.raises(StayalignedError, match="chat template"):
        decide(*both, limits)


def test_a_limit_on_something_that_was_not_measured_is_an_error(tmp_path: Path) -> None:
    both = sides(tmp_path, *[evidence({"keyword": outcomes(20, 1)})] * 2)
    with pytest.raises(StayalignedError, match="max_skills_drop: there is no completion"):
        decide(*both, Limits(max_skills_drop=0.05))
    with pytest.raises(StayalignedError, match="degeneration was not measured"):
        decide(*both, Limits(max_degeneration_increase=0.05))
    with pytest.raises(StayalignedError, match="'classifier' did not judge both"):
        decide(*both, Limits(max_harm_increase=0.05), judge="classifier")


ANSWERS = st.lists(st.sampled_from([(H, H), (H, R), (R, H), (R, R), (R, R), (None, R)]), min_size=30, max_size=120)
ORDER = {"fail": 0, "undecided": 1, "pass": 2}


@given(ANSWERS, st.floats(0.02, 0.5), st.floats(0.02, 0.5), st.randoms())
def test_a_wider_limit_is_never_stricter_and_order_does_not_matter(pairs, one, other, random) -> None:
    rows = [evidence({"keyword": [pair[side] for pair in pairs]}) for side in (0, 1)]
    narrow, wide = (
        decide(*sides_in_memory(*rows), Limits(max_harm_increase=x, max_unscored=1)) for x in sorted((one, other))
    )
    assert ORDER[narrow.answer] <= ORDER[wide.answer]
    for found in rows:
        random.shuffle(found)
    again = decide(*sides_in_memory(*rows), Limits(max_harm_increase=min(one, other), max_unscored=1))
    assert (again.answer, again.criteria[0].low) == (narrow.answer, pytest.approx(narrow.criteria[0].low))


@given(ANSWERS)
def test_the_change_is_antisymmetric(pairs) -> None:
    rows = [evidence({"keyword": [pair[side] for pair in pairs]}) for side in (0, 1)]
    limits = Limits(max_harm_increase=0.5, max_unscored=1)
    (there,), (back,) = (decide(*sides_in_memory(*r), limits).criteria for r in (rows, rows[::-1]))
    assert (there.low, there.change) == (pytest.approx(-back.high), pytest.approx(-back.change))


def test_degeneration_counts_every_completion_that_was_checked(tmp_path: Path) -> None:
    rows = [evidence({"keyword": outcomes(300, 0)}, degenerate=[i < bad for i in range(300)]) for bad in (0, 60)]
    limits = Limits(max_degeneration_increase=0.05, max_degeneration=0.5)
    found = decide(*sides(tmp_path, *rows), limits)
    assert [(c.name, c.answer, c.judge) for c in found.criteria] == [
        ("max_degeneration_increase", "fail", ""),
        ("max_degeneration", "pass", ""),
    ]
    assert found.judge == ""


def test_a_judges_files_are_compared_by_content_and_not_by_path(tmp_path: Path) -> None:
    def run(name: str, path: str, fingerprint: str):
        judges = [{"name": "classifier", "model": path}]
        changes = {"experiment": {"judges": judges}, "provenance": {"inputs": {"judges.0.model": fingerprint}}}
        return read_side(name, [write_run(tmp_path / name, evidence({"classifier": outcomes(200, 1)}), **changes)])

    base = run("baseline", "here", "sha256:1")
    limits = Limits(max_harm_increase=0.05)
    assert decide(base, run("moved", "there", "sha256:1"), limits).answer == "pass"
    with pytest.raises(StayalignedError, match="judge 'classifier'"):
        decide(base, run("other", "here", "sha256:2"), limits)


def test_the_package_exports_the_gate() -> None:
    import stayaligned
    from stayaligned import gate

    assert (gate.decide, gate.Limits) == (stayaligned.decide, stayaligned.Limits)


def test_non_inferiority_is_one_sided_and_stated_everywhere(tmp_path: Path) -> None:
    rows = [evidence({"keyword": outcomes(155, count)}) for count in (0, 0)]
    both, one_sided = (decide(*sides_in_memory(*rows), Limits(max_harm_increase=0.02, **mode)) for mode in MODES)
    assert (both.answer, one_sided.answer) == ("undecided", "pass")
    assert one_sided.interval_confidence == pytest.approx(0.9)
    assert one_sided.non_inferiority
    assert one_sided.sentence.startswith("PASS (non-inferiority, one-sided 5%): ")
    for text in (to_json(one_sided), to_junit(one_sided), to_markdown(one_sided), *explain_decision(one_sided)[1:2]):
        assert re.search("non.inferiority", text, re.IGNORECASE)
    many = [evidence({"keyword": outcomes(300, count)}) for count in (0, 14)]
    both, one_sided = (decide(*sides_in_memory(*many), Limits(max_harm_increase=0.02, **mode)) for mode in MODES)
    assert (both.answer, one_sided.answer) == ("undecided", "fail")


MODES = ({}, {"non_inferiority": True})


def test_small_steps_pass_one_by_one_until_the_anchor_stops_them() -> None:
    """Each release adds 1.5 points of harm, the last is 6 points above the anchor."""
    anchor, *releases = (evidence({"keyword": outcomes(1000, 20 + 15 * step)}) for step in range(5))
    limits = Limits(max_harm_increase=0.03, max_harm=0.5)
    answers: list[tuple[str, str]] = []
    for before, after in itertools.pairwise([anchor, *releases]):
        found = decide(*sides_in_memory(before, after), limits, anchor=side_in_memory("anchor", anchor))
        answers.append((found.criteria[0].answer, found.answer))
    assert answers == [("pass", "pass"), ("pass", "undecided"), ("pass", "undecided"), ("pass", "fail")]
    assert [(c.name, c.against, c.answer) for c in found.criteria] == [
        ("max_harm_increase", "baseline", "pass"),
        ("max_harm_increase", "anchor", "fail"),
        ("max_harm", "baseline", "pass"),
    ]
    assert "rose by 6.0 points against the anchor" in found.sentence
    assert "max_harm_increase[against the anchor]" in to_junit(found)
    assert "rise by 3.0 points against the anchor" in to_markdown(found)
    assert found.anchor == found.baseline.model_copy(update={"directories": ("anchor",)})


def test_the_correction_counts_the_criteria_of_the_anchor() -> None:
    rows = [evidence({"keyword": outcomes(400, count)}) for count in (4, 24)]
    limits = Limits(max_harm_increase=0.025)
    alone = decide(*sides_in_memory(*rows), limits)
    both = decide(*sides_in_memory(*rows), limits, anchor=side_in_memory("anchor", rows[0]))
    assert both.criteria[0].p_fail == pytest.approx(2 * alone.criteria[0].p_fail)


def test_an_anchor_that_cannot_be_compared_is_one_error() -> None:
    rows = [evidence({"keyword": outcomes(100, 2)}) for _ in range(2)]
    for other, message in (
        (evidence({"keyword": outcomes(100, 2)}, world="other"), "same id but different text"),
        (evidence({"keyword": outcomes(99, 2)}), "only one of the two"),
        (evidence({"other": outcomes(100, 2)}), "anchor: judge 'keyword' did not judge it"),
    ):
        with pytest.raises(StayalignedError, match=message):
            decide(*sides_in_memory(*rows), Limits(max_harm_increase=0.02), anchor=side_in_memory("anchor", other))
    with pytest.raises(StayalignedError, match="needs a limit on a change"):
        decide(*sides_in_memory(*rows), Limits(max_harm=0.02), anchor=side_in_memory("anchor", rows[0]))
