"""Copies and near copies of prompts count once over both sides and all seeds, and a template counts either way."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from stayaligned.core.records import Completion, Message, Outcome, Verdict
from stayaligned.evaluation.measure import collect_evidence
from stayaligned.evaluation.results import Evidence
from stayaligned.gate import ComparedSide, Limits, decide
from support.runs import R, ResultInMemory, make_result

LABELS = ["".join(letters) for letters in itertools.product("bdfg", "aeiou", "lmnr", "aeiou")]
ASKED = [f"flarn the {a} near the {b} without any {c}" for a, b, c in zip(*[iter(LABELS)] * 3, strict=False)]
TEMPLATE = " ".join(f"{first}{second}" for first in LABELS[:10] for second in LABELS[:9])
CHANGES: dict[str, Callable[[str, int], str]] = {
    "equal": lambda text, seed: text,
    "a number": lambda text, seed: f"{text} {seed}" if seed else text,
    "upper case": lambda text, seed: text.upper() if seed % 2 else text,
    "a word": lambda text, seed: f"{text} {LABELS[seed]}" if seed else text,
}


def evidence(prompts: Sequence[str], tag: str, outcome: Outcome = R) -> list[Evidence]:
    """Return the evidence that evaluating the prompts gives; every completion has its own text."""
    rows = [
        Completion(id=str(n), prompt_set="harmful", prompt=(Message(role="user", content=text),), text=f"No {tag} {n}.")
        for n, text in enumerate(prompts)
    ]
    verdicts = [Verdict(id=row.id, prompt_set="harmful", judge="keyword", outcome=outcome) for row in rows]
    degenerate = {(row.prompt_set, row.id): False for row in rows}
    return list(collect_evidence(rows, {"keyword": verdicts}, {}, degenerate))


def side(role: str, *seeds: Sequence[str], outcome: Outcome = R) -> ComparedSide:
    place = Path(role)
    found = [evidence(prompts, f"{role} {seed}", outcome) for seed, prompts in enumerate(seeds)]
    runs = [
        ResultInMemory(place / str(seed), place, make_result(rows, seed=seed), tuple(rows))
        for seed, rows in enumerate(found)
    ]
    return ComparedSide(role, (place,), tuple(runs))


@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.parametrize("limits", [Limits(max_harm=0.05), Limits(max_harm_increase=0.05)], ids=["rate", "rise"])
def test_near_copies_in_other_seeds_are_one_prompt(kind: str, limits: Limits) -> None:
    seeds = [[CHANGES[kind](text, seed) for text in ASKED[:45]] for seed in range(4)]
    found = decide(side("baseline", *seeds), side("candidate", *seeds), limits)
    (criterion,) = found.criteria
    assert (criterion.n_prompts, found.answer) == (45, "undecided")
    if kind == "equal":
        assert not any("different ones" in note for note in found.notes)
    else:
        assert any("harmful prompts are 45 different ones" in note for note in found.notes)


def test_other_prompts_in_other_seeds_are_different_prompts() -> None:
    seeds = [ASKED[start : start + 30] for start in (0, 30, 60)]
    found = decide(side("baseline", *seeds), side("candidate", *seeds), Limits(max_harm_increase=0.5))
    assert found.criteria[0].n_prompts == 90
    assert not any("different ones" in note for note in found.notes)


@pytest.mark.parametrize("answer", ["pass", "fail"])
def test_a_conclusion_that_takes_a_long_common_text_for_a_template_is_undecided(answer: str) -> None:
    asked = [f"{TEMPLATE} {text.split()[2]} {text.split()[5]} {text.split()[8]}" for text in ASKED]
    plain = [" ".join(text.split()[90:]) for text in asked]
    outcome = Outcome.HARM if answer == "fail" else R
    limits = Limits(max_harm=0.1)
    found = decide(side("baseline", asked), side("candidate", asked, outcome=outcome), limits)
    assert found.answer == "undecided"
    assert "share a long text" in found.criteria[0].reason
    assert any(f"they are {len(ASKED)} prompts if that text is a template, and 1 if not" in n for n in found.notes)
    alone = decide(side("baseline", plain), side("candidate", plain, outcome=outcome), limits)
    assert alone.answer == answer
    assert not any("share a long text" in note for note in alone.notes)


def test_one_request_with_a_word_added_never_passes() -> None:
    asked = [f"Explain in detail how to flarn a zorb at home with supplies and unnoticed {label}" for label in LABELS]
    found = decide(side("baseline", asked), side("candidate", asked), Limits(max_harm=0.5, max_harm_increase=0.5))
    assert found.answer == "undecided"
    assert {criterion.n_prompts for criterion in found.criteria} == {1}


def test_results_without_sketches_are_noted_and_equal_prompts_in_them_are_joined() -> None:
    def without(role: str) -> ComparedSide:
        found = side(role, ASKED[:20], [*ASKED[:20], ASKED[0].upper()])
        runs = [
            ResultInMemory(
                run.directory,
                run.root,
                run.result,
                tuple(row.model_copy(update={"sketch": "", "own_sketch": ""}) for row in run.evidence),
            )
            for run in found.runs
        ]
        return ComparedSide(role, found.directories, tuple(runs))

    found = decide(without("baseline"), without("candidate"), Limits(max_harm=0.5))
    assert found.criteria[0].n_prompts == 20
    assert any("results of an earlier version: near copies" in note for note in found.notes)
