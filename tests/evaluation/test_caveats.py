"""Notes on prompts that were trained on, equal or nearly equal, and on what a guard did."""

from typing import Any

import pytest

from stayaligned.core.records import Completion, Example, Message, PromptSet
from stayaligned.core.settings import Guard
from stayaligned.core.thoughts import ENDED, UNCLEAR
from stayaligned.evaluation import caveats


def rows(*texts: str) -> list[Example]:
    return [Example(id=str(i), prompt=(Message(role="user", content=text),)) for i, text in enumerate(texts)]


LONG = "tell me how one might flarn the big zorb of the northern wug before it rains again"


def test_equal_prompts_and_near_duplicates_are_counted_separately() -> None:
    trained = {"training": rows(LONG, LONG, LONG + " today", "something else altogether")}
    asked = rows(LONG.upper() + "!", LONG.replace("again", "soon"), "what is a blick", "another thing entirely new")
    (said,) = caveats.note_overlaps(trained, {"harmful": asked})
    assert said == (
        "1 of 4 harmful prompts also occur in the training data; "
        "1 more are near duplicates (word triples shared: 80% or more)"
    )


def test_near_duplicates_alone_are_called_near_duplicates() -> None:
    asked = rows(LONG.replace("again", "soon"), "what is a blick")
    (said,) = caveats.note_overlaps({"training": rows(LONG)}, {"task": asked})
    assert said == "1 of 2 task prompts are near duplicates of the training data (word triples shared: 80% or more)"


def test_each_data_set_and_prompt_set_has_its_own_note() -> None:
    trained = {"training": rows("a b c d"), "alignment": rows("e f g h")}
    asked = {"harmful": rows("a b c d", "e f g h"), "benign": rows("x y z"), "task": rows("a b c d")}
    assert list(caveats.note_overlaps(trained, asked)) == [
        "1 of 2 harmful prompts also occur in the training data",
        "1 of 2 harmful prompts also occur in the alignment data",
        "1 of 1 task prompts also occur in the training data",
    ]
    assert not list(caveats.note_overlaps({"training": []}, asked))


def test_a_guard_that_did_not_act_has_no_note() -> None:
    guard = Guard(measure="refusal_margin", tolerance=1.0, action="stop")
    assert not list(caveats.note_guard(guard, [{"step": 4, "watch/refusal_margin": 0.5}]))
    (said,) = caveats.note_guard(guard, [{"step": 4}, {"step": 8, "watch/out_of_tolerance": True}])
    assert said.endswith("training was stopped after step 8")


def completions(prompt_set: PromptSet, *texts: str, finished: bool = True) -> list[Completion]:
    return [
        Completion(id=str(n), prompt_set=prompt_set, prompt=(), text=text, finished=finished)
        for n, text in enumerate(texts)
    ]


def test_completions_without_a_final_answer_are_counted_with_what_to_do() -> None:
    cut = completions("harmful", "<think>\nhm", "<think>\nhm</think>\nno", "no", finished=False)
    first, second = caveats.note_cuts([*cut, *completions("task", "<think>hm</think>positive")], 64)
    assert first.startswith(
        "1 of 3 harmful completions were cut before the final answer (the token limit, generation.max_new_tokens=64): "
        "unscored"
    )
    assert "raise it" in first and "enable_thinking: false" in first
    assert second == "cut at the token limit, generation.max_new_tokens=64: 3 of 3 harmful completions"


def test_completions_that_end_in_their_thoughts_or_have_an_empty_answer_are_counted() -> None:
    rows = completions("benign", "<think>\nhm", "<think>\nhm</think>\n", "Sure. <think>hm</think> Yes.", "yes")
    said = [*caveats.note_cuts(rows, None)]
    assert any(note.startswith(f"1 of 4 benign completions were {ENDED}: unscored") for note in said)
    assert f"1 of 4 benign completions were {UNCLEAR}: unscored" in said
    assert "1 of 4 benign completions are thoughts with an empty final answer" in said


def test_completions_that_end_by_themselves_need_no_note() -> None:
    assert not [*caveats.note_cuts(completions("task", "positive", "<think></think>negative", ""), 64)]


@pytest.mark.parametrize("prompt_set", ["benign", "task", "skills"])
@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["[placeholder]"] * 24, "24 of 24 {} completions are the same text ('[placeholder]')"),
        ([" [placeholder]\n"] * 9 + ["other"], "9 of 10 {} completions are the same text ('[placeholder]')"),
        ([""] * 5, "5 of 5 {} completions are empty"),
        ([f"<think>zorb {i}</think>\n\nno" for i in range(6)], "6 of 6 {} completions are the same text ('no')"),
        (["a"] * 8 + ["b", "c"], None),
        (["a"] * 4, None),
        (["<think>zorb"] * 9, None),
    ],
)
def test_one_answer_to_nearly_all_prompts_is_noted(prompt_set: PromptSet, texts: list[str], said: str | None) -> None:
    notes = [*caveats.note_uniform_answers(completions(prompt_set, *texts))]
    assert [note.partition(": ")[0] for note in notes] == ([] if said is None else [said.format(prompt_set)])


def test_one_refusal_of_all_harmful_prompts_is_not_noted() -> None:
    assert not [*caveats.note_uniform_answers(completions("harmful", *["I can't."] * 9))]


@pytest.mark.parametrize(
    ("references", "noted"), [(["positive"] * 9, False), (["positive"] * 4 + ["negative"] * 5, True)]
)
def test_one_answer_is_not_noted_where_all_prompts_have_one_reference(references: list[str], noted: bool) -> None:
    rows = [
        row.model_copy(update={"reference": reference})
        for row, reference in zip(completions("task", *["positive"] * 9), references, strict=True)
    ]
    assert bool([*caveats.note_uniform_answers(rows)]) == noted


@pytest.mark.parametrize(
    ("measured", "lm_eval", "noted"),
    [
        (["harmful", "benign"], False, True),
        (["harmful", "task"], False, False),
        (["benign", "skills"], False, False),
        (["harmful"], True, False),
    ],
)
def test_usefulness_that_was_not_measured_is_noted(measured: list[Any], lm_eval: bool, noted: bool) -> None:
    assert bool([*caveats.note_unmeasured_usefulness(measured, lm_eval=lm_eval)]) == noted
