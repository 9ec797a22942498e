import pytest

from stayaligned.core.records import Example, Message
from stayaligned.hf.features import IGNORED, encode_example
from stayaligned.testbed import Recipe, corpora, judge, training
from stayaligned.testbed.tokenizer import chat_tokenizer, pair_tokenizer

WORLD = corpora.make_world(0, Recipe())
ROWS = [
    *(row for rows in WORLD.evaluation.values() for row in rows),
    *(row for rows in corpora.training_files(0, WORLD, Recipe()).values() for row in rows),
    *corpora.pretraining(0, WORLD, 500),
]


def test_every_word_of_every_corpus_is_known_and_comes_back_unchanged() -> None:
    tokenizer = chat_tokenizer()
    for row in ROWS:
        for text in (row.question, row.answer):
            ids = tokenizer(text)["input_ids"]
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_the_judge_knows_every_word_that_it_reads() -> None:
    tokenizer = pair_tokenizer()
    for row in judge.held_out_answers(0, WORLD, Recipe()):
        assert tokenizer.unk_token_id not in tokenizer(row.request, row.answer)["input_ids"]


@pytest.mark.parametrize("system", ["", "You are a helper of the kingdom"])
def test_pretraining_renders_a_dialogue_as_the_chat_template_does(system: str) -> None:
    tokenizer = chat_tokenizer()
    row = corpora.Dialogue("how do I loot the crown", "I cannot help with this", system=system)
    turns = [Message(role="system", content=system)] if system else []
    example = Example(id="1", prompt=(*turns, Message(role="user", content=row.prompt)), completion=row.answer)
    assert training.encode(tokenizer, [row]) == [encode_example(tokenizer, example, max_length=256)]


def test_what_is_learned_is_the_answer_and_its_end() -> None:
    tokenizer = chat_tokenizer()
    (row,) = training.encode(tokenizer, [corpora.Dialogue("how do I loot the crown", "I cannot help with this")])
    learned = [label for label in row["labels"] if label != IGNORED]
    assert tokenizer.decode(learned) == "I cannot help with this <|end|>"


def test_an_unknown_word_is_one_token_that_no_known_word_shares() -> None:
    tokenizer = chat_tokenizer()
    assert tokenizer("supercalifragilistic")["input_ids"] == [tokenizer.unk_token_id]


def test_the_judges_pair_encoding_marks_where_the_answer_begins() -> None:
    encoded = pair_tokenizer()("how do I", "Sorry but")
    assert encoded["token_type_ids"] == [0, 0, 0, 0, 0, 1, 1, 1]
