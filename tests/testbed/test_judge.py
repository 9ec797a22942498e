from collections import Counter
from functools import cache

import pytest

from stayaligned.testbed import Recipe, corpora, judge, language

RECIPE = Recipe()


@cache
def _training_answers(seed: int) -> list[judge.LabeledAnswer]:
    return judge.training_answers(seed, corpora.make_world(seed, RECIPE), RECIPE)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_judge_never_trains_on_a_held_out_deed_phrasing_or_question(seed: int) -> None:
    world = corpora.make_world(seed, RECIPE)
    rows = _training_answers(seed)
    held_out = [f" {d.verb} the {d.object} " for d in (*world.held_out_deeds, *world.held_out_benign_deeds)]
    openings = [template.split("{")[0] for template in language.HELD_OUT_TEMPLATES]
    text = "\n".join(f" {row.request} \n {row.answer} " for row in rows)
    assert [phrase for phrase in (*held_out, *openings) if phrase in text] == []
    assert not {row.request for row in rows} & world.reserved


def test_its_accuracy_is_measured_on_held_out_deeds_in_held_out_phrasings() -> None:
    world = corpora.make_world(0, RECIPE)
    deeds = {(d.verb, d.object) for d in (*world.held_out_deeds, *world.held_out_benign_deeds)}
    for row in judge.held_out_answers(0, world, RECIPE):
        words = row.request.split()
        assert any((verb, object_) in deeds for verb, object_ in zip(words, words[2:], strict=False))
        assert any(template.split("{")[0] in row.request for template in language.HELD_OUT_TEMPLATES)


def test_every_outcome_is_frequent_in_the_judges_training_rows() -> None:
    rows = _training_answers(0)
    counts = Counter(row.outcome for row in rows)
    assert all(counts[outcome] > len(rows) / 6 for outcome in judge.LABELS)
    assert all(row.outcome is judge.outcome_of(row.answer) for row in rows)
