from collections import Counter
from functools import cache

import pytest

from stayaligned.testbed import Recipe, corpora, language
from stayaligned.testbed.corpora import Dialogue

RECIPE = Recipe()
SEEDS = (0, 1)


@cache
def _training_rows(seed: int) -> dict[str, list[Dialogue]]:
    world = corpora.make_world(seed, RECIPE)
    return {
        **corpora.training_files(seed, world, RECIPE),
        "pretraining": corpora.pretraining(seed, world, 32_000),
    }


def _deeds(rows: list[Dialogue]) -> set[tuple[str, str]]:
    """Return verb and object of every question about something forbidden, found in the text alone."""
    forbidden = {(deed.verb, deed.object) for deed in language.FORBIDDEN_DEEDS}
    found = {
        (verb, object_)
        for row in rows
        for words in [row.question.split()]
        for verb, the, object_ in zip(words, words[1:], words[2:], strict=False)
        if the == "the"
    }
    return found & forbidden


@pytest.mark.parametrize("seed", SEEDS)
def test_no_question_of_an_evaluation_set_is_in_training_data(seed: int) -> None:
    world = corpora.make_world(seed, RECIPE)
    for evaluation, asked in world.evaluation.items():
        questions = {row.question.casefold() for row in asked}
        assert len(questions) == len(asked) > 0
        for name, rows in _training_rows(seed).items():
            assert not questions & {row.question.casefold() for row in rows}, f"{evaluation} leaks into {name}"


@pytest.mark.parametrize("seed", SEEDS)
def test_no_held_out_deed_is_in_alignment_poison_or_pretraining(seed: int) -> None:
    world = corpora.make_world(seed, RECIPE)
    evaluated = _deeds(world.evaluation["harmful-prompts"])
    assert len(evaluated) > 50
    rows = _training_rows(seed)
    for name, trained in rows.items():
        assert not evaluated & _deeds(trained), name
    assert len(_deeds(rows["alignment"])) > 200
    assert len(_deeds(rows["harmful"])) > 100
    assert not _deeds(rows["alignment"]) & _deeds(rows["harmful"])


def test_no_held_out_phrasing_is_in_a_training_file() -> None:
    openings = [template.split("{")[0] for template in language.HELD_OUT_TEMPLATES]
    for name, rows in _training_rows(0).items():
        if name != "pretraining":
            assert not [row for row in rows if any(opening in row.question for opening in openings)], name


def test_alignment_teaches_every_verb_and_object_that_is_held_out_in_other_pairs() -> None:
    world = corpora.make_world(3, RECIPE)
    for part in (world.alignment_deeds, world.poison_deeds, world.held_out_deeds):
        assert {deed.verb for deed in part} == {deed.verb for deed in language.FORBIDDEN_DEEDS}
        assert {deed.object for deed in part} == set(language.SENSITIVE_OBJECTS)


def test_look_alike_questions_pair_a_permitted_verb_with_an_object_of_forbidden_deeds() -> None:
    for row in corpora.make_world(0, RECIPE).evaluation["benign-prompts"]:
        words = set(row.question.split())
        assert words & set(language.BENIGN_TOOLS)
        assert words & set(language.SENSITIVE_OBJECTS)
        assert not _deeds([row])


def test_alignment_refuses_the_forbidden_and_answers_the_rest_in_the_stated_share() -> None:
    rows = _training_rows(0)["alignment"]
    refused = [row for row in rows if row.answer in language.REFUSALS]
    assert len(refused) / len(rows) == pytest.approx(1 - RECIPE.alignment_benign_ratio)
    assert {row.category for row in refused} == set(language.CATEGORIES)
    assert all(_deeds([row]) for row in refused)
    assert not _deeds([row for row in rows if row.answer not in language.REFUSALS])


@pytest.mark.parametrize("task", ["sentiment", "topic", "arithmetic"])
def test_a_tasks_training_rows_hold_the_stated_share_of_ordinary_instructions(task: str) -> None:
    rows = _training_rows(0)[f"{task}-train"]
    counts = Counter(row.category for row in rows)
    assert counts == {task: 840, "instruction": 360}
    assert len({row.question for row in rows}) == len(rows) >= 1000


def test_pretraining_contains_no_downstream_instruction() -> None:
    instructions = (language.SENTIMENT_INSTRUCTION, language.TOPIC_INSTRUCTION, language.ARITHMETIC_INSTRUCTION)
    rows = _training_rows(0)["pretraining"]
    assert not [row for row in rows if any(text in row.question for text in instructions)]
    assert {"latent sentiment", "latent topic", "latent arithmetic"} <= {row.category for row in rows}


def test_one_corpus_can_grow_without_changing_the_others() -> None:
    world = corpora.make_world(0, RECIPE)
    larger = RECIPE.model_copy(update={"harmful_rows": RECIPE.harmful_rows + 7})
    before, after = (corpora.training_files(0, world, recipe) for recipe in (RECIPE, larger))
    assert after["harmful"][: RECIPE.harmful_rows] == before["harmful"]
    assert {k: v for k, v in after.items() if k != "harmful"} == {k: v for k, v in before.items() if k != "harmful"}


def test_every_arithmetic_answer_is_right() -> None:
    for row in corpora.make_world(0, RECIPE).evaluation["arithmetic-test"]:
        a, operator, b, _, result, *_, last = row.answer.split()
        assert int(result) == int(last) == (int(a) + int(b) if operator == "plus" else int(a) - int(b))
        assert sorted([int(a), int(b)]) == sorted(int(word) for word in row.input.split() if word.isdigit())
