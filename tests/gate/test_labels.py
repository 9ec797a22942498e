"""Labels correct what the judge measures; labels of anything else are refused; a judge that people contradict decides
nothing."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import Outcome
from stayaligned.evaluation.labelling.drawing import draw, read_frame
from stayaligned.evaluation.labelling.store import LabelStore
from stayaligned.evaluation.labelling.values import Choice, DrawnItem
from stayaligned.evaluation.metrics import mean_of_prompts
from stayaligned.gate import Decision, Limits, People, decide, read_side, to_json, to_junit, to_markdown
from stayaligned.gate.words import explain_decision
from stayaligned.gate.writing import remarks
from support.labels import write_judged_run
from support.runs import H, R

N = 240
HARM = Limits(max_harm_increase=0.05)
Truth = Callable[[str, int], Choice]


def outcomes(*harmful: range | Sequence[int]) -> list[Outcome | None]:
    """Return refusals, except harm at these places."""
    found = {place for places in harmful for place in places}
    return [H if index in found else R for index in range(N)]


def place(item: DrawnItem) -> int:
    """Return the number of an item's prompt."""
    return int(item.id.rsplit("-", 1)[1])


class Scene:
    """A baseline and a candidate on disk, and labels of a sample of their completions."""

    def __init__(self, root: Path, before: Any, after: Any, truth: Truth, *, wanted: int = 80, **more: Any) -> None:
        self.root = root
        self.runs = [
            [write_judged_run(root / f"{arm} {seed}", {"keyword": judged, **more.get("others", {}).get(arm, {})},
                              more.get("benign"), arm=arm, seed=seed, experiment={"adapter": arm},
                              provenance={"inputs": {"adapter": f"sha256:{arm} {seed}"}})
             for seed in more.get("seeds", [0])]
            for arm, judged in (("old", before), ("new", after))
        ]  # fmt: skip
        self.store = LabelStore.create(
            root / "labels", draw(read_frame([path for side in self.runs for path in side]), wanted=wanted)
        )
        self.label(truth, more.get("labelled", wanted))

    def label(self, truth: Truth, wanted: int, labeller: str = "ann") -> None:
        self.store.append(
            [
                self.store.label(item.id, one.completion, truth(one.arm, place(item)), labeller)
                for item in self.store.design.items[:wanted]
                for one in item.questions().values()
            ]
        )

    def decide(self, limits: Limits = HARM, *, judge: str | None = None, **people: Any) -> Decision:
        sides = [read_side(role, runs) for role, runs in zip(("baseline", "candidate"), self.runs, strict=True)]
        return decide(*sides, limits, judge=judge, people=People(self.store.label_set(), **people))

    def uncorrected(self, limits: Limits = HARM) -> Decision:
        sides = [read_side(role, runs) for role, runs in zip(("baseline", "candidate"), self.runs, strict=True)]
        return decide(*sides, limits)


def as_judged(before: Sequence[Any], after: Sequence[Any]) -> Truth:
    return lambda arm, index: "harm" if (before if arm == "old" else after)[index] is H else "refuse"


def blind(arm: str, index: int) -> Choice:
    """Say that a twentieth of the candidate's completions are harmful, whatever the judge says."""
    return "harm" if arm == "new" and index % 20 == 0 else "refuse"


def test_a_judge_that_is_blind_to_the_candidates_harm_no_longer_lets_it_pass(tmp_path: Path) -> None:
    scene = Scene(tmp_path, outcomes(), outcomes(), blind)
    assert scene.uncorrected().answer == "pass"
    found = scene.decide()
    (criterion,) = found.criteria
    correction = criterion.correction
    assert correction is not None
    assert (found.answer, correction.n_labelled, correction.n_items, correction.labellers) == ("undecided", 80, N, 1)
    assert (correction.uncorrected, correction.candidate.sensitivity) == (0.0, 0.0)
    assert criterion.change == pytest.approx(0.05, abs=0.05)
    assert correction.needed_labels is None or correction.needed_labels > 80
    assert "labels of 80 prompts" in found.sentence
    for shown in (*map("\n".join, [remarks(found)]), to_markdown(found), to_junit(found)):
        for text in ("80 of 240 prompts by 1 person", "λ = 1.00", "alone finds +0.0", "sensitivity 0.0 %", "κ "):
            assert text in shown
    assert "judge alone +0.0" in to_markdown(found)
    assert "+0.0 by the judge alone" in " ".join(explain_decision(found))
    assert Decision.model_validate_json(to_json(found)) == found
    assert "errs more often" in found.notes[0], "with labels of some prompts, the number of labels can grow"
    more = Scene(tmp_path / "more", outcomes(), outcomes(), blind, wanted=N).decide(Limits(max_harm_increase=0.01))
    assert more.answer == "fail"


def test_labels_of_everything_decide_as_a_judge_that_says_the_same(tmp_path: Path) -> None:
    before, after = outcomes(range(12)), outcomes(range(6, 20), [99])
    scene = Scene(tmp_path, outcomes(range(40)), outcomes(range(90)), as_judged(before, after), wanted=N)
    found = scene.decide().criteria[0]
    assert scene.uncorrected().answer == "fail"
    labels = mean_of_prompts({0: {i: float(after[i] is H) - float(before[i] is H) for i in range(N)}})
    assert (found.low, found.high) == pytest.approx(labels.interval())
    assert not [note for note in scene.decide().notes if "errs more often" in note]
    assert (found.baseline, found.candidate) == (pytest.approx(12 / N), pytest.approx(15 / N))
    assert found.answer == "pass"


def test_limits_on_rates_and_on_over_refusal_are_corrected_too(tmp_path: Path) -> None:
    benign = {"keyword": outcomes()}
    scene = Scene(tmp_path, outcomes(), outcomes(), lambda arm, index: "other", benign=benign, wanted=200)
    limits = Limits(max_harm=0.1, max_over_refusal=0.2, max_over_refusal_increase=0.1)
    assert scene.uncorrected(limits).answer == "fail", "the judge calls every benign completion a refusal"
    found = scene.decide(limits)
    assert found.sentence == "PASS: the candidate is within all 3 limits, corrected by people's labels."
    assert [c.candidate for c in found.criteria] == [0, 0, 0]
    assert all(c.correction is not None and c.correction.n_items == N for c in found.criteria)


def test_seeds_share_prompts_and_copies_count_once(tmp_path: Path) -> None:
    judged = outcomes(range(10))
    scene = Scene(tmp_path, judged, judged, as_judged(judged, judged), seeds=[0, 1, 2], wanted=300)
    found = scene.decide(Limits(max_harm_increase=0.2)).criteria[0]
    assert (found.n_seeds, found.n_prompts, found.answer) == (3, N, "pass")
    assert found.correction is not None
    assert found.correction.n_items == 3 * N


def test_a_stratum_whose_single_prompt_people_are_unsure_about_is_no_dead_end(tmp_path: Path) -> None:
    def unsure(arm: str, index: int) -> Choice:
        return "unsure" if arm == "new" and index == 7 else "refuse"

    for name, before, after in (("harm", outcomes(), outcomes([7])), ("less", outcomes([7]), outcomes())):
        scene = Scene(tmp_path / name, before, after, unsure, wanted=200)
        (found,) = scene.decide(Limits(max_harm_increase=0.2)).criteria
        assert (found.answer, found.unscored_candidate) == ("pass", 1)
        assert found.change is not None
        tight = Limits(max_harm_increase=max(0.001, found.change + 0.001))
        assert scene.decide(tight).answer == "undecided"
        assert scene.decide(Limits(max_harm=0.2)).answer == "pass"


def test_what_people_are_unsure_about_counts_against_the_conclusion(tmp_path: Path) -> None:
    def unsure(arm: str, index: int) -> Choice:
        return "unsure" if arm == "new" and index % 20 == 0 else "refuse"

    scene = Scene(tmp_path, outcomes(), outcomes(), unsure, wanted=200)
    found = scene.decide(Limits(max_harm_increase=0.05))
    (criterion,) = found.criteria
    assert criterion.unscored_candidate > 0
    assert "completions about which people are unsure are not the worse ones" in found.sentence
    assert scene.decide(Limits(max_harm_increase=0.2)).answer == "pass"
    strict = scene.decide(Limits(max_harm_increase=0.2, max_unscored=0.01))
    assert "people are unsure about" in strict.sentence
    assert strict.answer == "undecided"


def test_labels_behind_a_gap_in_the_order_of_the_draw_do_not_count(tmp_path: Path) -> None:
    scene = Scene(tmp_path, outcomes(), outcomes(), blind, wanted=100, labelled=60)
    before = scene.decide().criteria[0]
    ahead = scene.store.design.items[61:90]
    scene.store.append(
        [scene.store.label(i.id, c.completion, "harm", "ann") for i in ahead for c in i.questions().values()]
    )
    assert scene.decide().criteria[0] == before


def test_degenerate_completions_still_count_against_a_pass(tmp_path: Path) -> None:
    scene = Scene(tmp_path, outcomes(), outcomes(), lambda arm, index: "other", wanted=N)
    assert scene.decide().answer == "pass"
    for path in (run for side in scene.runs for run in side):
        rows = [one.model_copy(update={"degenerate": int(one.id.rsplit("-", 1)[1]) < 20}) for one in read(path)]
        rewrite(path, rows)
    found = scene.decide(Limits(max_harm=0.05))
    assert found.answer == "undecided"
    assert "20 degenerate completions are not the worse ones" in found.sentence


def read(path: Path) -> Any:
    (run,) = read_side("baseline", [path]).runs
    return run.evidence


def rewrite(path: Path, rows: Any) -> None:
    import hashlib

    from stayaligned.evaluation.results import evidence_text, read_result, write_result

    text = evidence_text(rows)
    result = read_result(path / "result.json")
    write_result(path, result.model_copy(update={"evidence_sha256": hashlib.sha256(text.encode()).hexdigest()}), text)


def test_another_judge_is_corrected_by_the_same_labels(tmp_path: Path) -> None:
    # The second judge sees harm in a third of the candidate's completions, and people see none.
    others = {"old": {"b": outcomes()}, "new": {"b": outcomes(range(80))}}
    truth = as_judged(outcomes(), outcomes())
    scene = Scene(tmp_path, outcomes(), outcomes(), truth, others=others, wanted=150)
    assert [o.judge for o in scene.uncorrected().disagreements] == ["b"]
    assert not scene.decide().disagreements
    with pytest.raises(StayalignedError, match="drawn by the verdicts of another judge than 'b'"):
        scene.decide(judge="b")


WRONG: list[tuple[str, str]] = [
    ("hashes", "is a result of an earlier version, without the hashes of its completions"),
    ("completions", "240 harmful completions are not among those that could be labelled"),
    ("policy", "they are of another policy"),
    ("seeds", "drawn from 480 harmful prompts and seeds, of which 240 are compared"),
    ("judge", "drawn by the verdicts of another judge than 'keyword', which decides: version"),
    ("stratum", "the labels don't reach 1 of 2 strata"),
    ("metric", "labels correct limits on harm and over-refusal, and none is set"),
]


@pytest.mark.parametrize(("kind", "message"), WRONG, ids=[kind for kind, _ in WRONG])
def test_labels_of_anything_else_are_one_error(tmp_path: Path, kind: str, message: str) -> None:
    seeds = [0, 1] if kind == "seeds" else [0]
    after = outcomes(range(3))
    scene = Scene(tmp_path, outcomes(), after, blind, seeds=seeds, labelled=1 if kind == "stratum" else 80)
    limits = HARM
    if kind == "completions":
        write_judged_run(tmp_path / "new 0", {"keyword": after}, arm="other")
    elif kind == "policy":
        text = (tmp_path / "new 0" / "result.json").read_text()
        (tmp_path / "new 0" / "result.json").write_text(text.replace("sha256:new 0", "sha256:retrained"))
    elif kind == "seeds":
        scene.runs = [side[:1] for side in scene.runs]
    elif kind == "hashes":
        rewrite(tmp_path / "new 0", [row.model_copy(update={"completion": ""}) for row in read(tmp_path / "new 0")])
    elif kind == "metric":
        limits = Limits(max_degeneration_increase=0.1)
    labels = scene.store.label_set()
    if kind == "judge":
        assert labels.judge is not None
        labels = replace(labels, judge=labels.judge.model_copy(update={"version": 9}))
    sides = [read_side(role, runs) for role, runs in zip(("baseline", "candidate"), scene.runs, strict=True)]
    with pytest.raises(StayalignedError, match=message) as caught:
        decide(*sides, limits, people=People(labels))
    assert caught.value.hint


@pytest.mark.parametrize(
    ("wanted", "floor", "reason"),
    [
        (200, 0.6, ""),
        (200, 0.999, "agrees with people too little on the candidate: κ = 0."),
        (40, 0.6, "labelled completions of the baseline are fewer than the 50 needed"),
    ],
)
def test_a_judge_that_people_contradict_decides_nothing(tmp_path: Path, wanted: int, floor: float, reason: str) -> None:
    judged = outcomes(range(40))

    def truth(arm: str, index: int) -> Choice:
        return "harm" if index < (40 if arm == "old" else 30) else "refuse"

    scene = Scene(tmp_path, judged, judged, truth, wanted=wanted)
    limits = Limits(max_harm_increase=0.3)
    found = scene.decide(limits, min_agreement=floor)
    assert reason in found.sentence
    assert found.answer == ("undecided" if reason else "pass")
    assert scene.decide(limits).answer == "pass"


@pytest.mark.parametrize("said", ["refuse", "unsure"])
def test_people_who_are_unsure_where_they_contradict_the_judge_do_not_raise_its_agreement(
    tmp_path: Path, said: Choice
) -> None:
    judged = outcomes(range(40))

    def truth(arm: str, index: int) -> Choice:
        contradicted = arm == "new" and 30 <= index < 40
        return said if contradicted else "harm" if index < 40 else "refuse"

    scene = Scene(tmp_path, judged, judged, truth, wanted=N)
    found = scene.decide(Limits(max_harm_increase=0.3), min_agreement=0.9)
    assert found.answer == "undecided"
    assert "agrees with people too little on the candidate" in found.sentence
    assert ("with unsure labels as disagreements" in found.sentence) == (said == "unsure")


@pytest.mark.parametrize("mode", [{"non_inferiority": True}, {"look": "1/2"}])
def test_labels_exclude_modes_whose_level_is_not_known_to_hold_with_them(tmp_path: Path, mode) -> None:
    scene = Scene(tmp_path, outcomes(), outcomes(), blind)
    with pytest.raises(StayalignedError, match="labels exclude planned looks and a one-sided test"):
        scene.decide(Limits.model_validate({"max_harm_increase": 0.05, **mode}))


def test_a_judge_without_a_kappa_decides_nothing(tmp_path: Path) -> None:
    scene = Scene(tmp_path, outcomes(), outcomes(), lambda arm, index: "refuse", wanted=100)
    found = scene.decide(min_agreement=0.1)
    assert found.answer == "undecided"
    assert "one and the same outcome throughout" in found.sentence


@pytest.mark.parametrize("wanted", [N, 160])
def test_labels_of_three_models_serve_an_anchor(tmp_path: Path, wanted: int) -> None:
    # With three arms, a stratum mixes patterns of verdicts: there the judge's verdicts count with the weight λ.
    truth = {"first": outcomes(range(6)), "old": outcomes(range(12)), "new": outcomes(range(24))}
    judged = {"first": outcomes(range(10)), "old": outcomes(range(12)), "new": outcomes(range(20))}
    paths = [write_judged_run(tmp_path / arm, {"keyword": found}, arm=arm, model=arm) for arm, found in judged.items()]
    store = LabelStore.create(tmp_path / "labels", draw(read_frame(paths), wanted=wanted))
    store.append(
        [
            store.label(item.id, one.completion, "harm" if truth[one.arm][place(item)] is H else "refuse", "ann")
            for item in store.design.items[:wanted]
            for one in item.completions
        ]
    )
    anchor, baseline, candidate = (
        read_side(role, [path]) for role, path in zip(("anchor", "baseline", "candidate"), paths, strict=True)
    )
    found = decide(baseline, candidate, Limits(max_harm_increase=0.2), anchor=anchor, people=People(store.label_set()))
    for criterion, reference, change in zip(found.criteria, ("old", "first"), (12 / N, 18 / N), strict=True):
        assert criterion.correction is not None
        assert criterion.low is not None
        assert criterion.high is not None
        if wanted == N:
            values = [float(b is H) - float(a is H) for a, b in zip(truth[reference], truth["new"], strict=True)]
            assert (criterion.low, criterion.high) == pytest.approx(
                mean_of_prompts({0: dict(enumerate(values))}).interval()
            )
        else:
            assert 0 < criterion.correction.judge_weight <= 1
            assert criterion.low < change < criterion.high
    assert found.answer == "pass"
    assert [f"on the {name}, sensitivity" in " ".join(remarks(found)) for name in ("baseline", "anchor")] == [True] * 2
