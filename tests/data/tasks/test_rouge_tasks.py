"""Alpaca and Dialog Summary: their rows, their draws, and ROUGE against values worked out by hand."""

import sys
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.tokenizers import DefaultTokenizer

from stayaligned.core.errors import StayalignedError
from stayaligned.data.tasks import _rouge
from stayaligned.data.tasks._rouge import rouge_f1
from stayaligned.data.tasks.alpaca import Alpaca, is_about_safety
from stayaligned.data.tasks.dialog_summary import DialogSummary
from support.tasks import completion, write_source


@pytest.mark.parametrize(
    ("text", "reference", "rouge1", "rouge_l"),
    [
        # 3 of 4 words are the reference's, 3 of its 6 are found: P = 3/4, R = 1/2, F1 = 3/5.
        ("Tom bakes a tart", "Tom bakes a cake for Ann.", 0.6, 0.6),
        # All 3 words stand in both, but in order only 2 do: F1 = 1 and 2/3.
        ("cake bakes tom", "Tom cake bakes", 1, 2 / 3),
        # "the" counts twice, as often as the reference has it: P = 2/3, R = 2/2.
        ("the the the", "the The", 0.8, 0.8),
        ("", "Tom", 0, 0),
        ("...", "Tom", 0, 0),
        ("Ann", "Tom", 0, 0),
        ("Tom", " ...", None, None),
    ],
)
def test_rouge_is_what_a_hand_works_out(text, reference, rouge1, rouge_l):
    assert rouge_f1(text, reference, "rouge1") == (None if rouge1 is None else pytest.approx(rouge1))
    assert rouge_f1(text, reference, "rougeL") == (None if rouge_l is None else pytest.approx(rouge_l))
    assert DialogSummary().score(completion(text, reference)) == rouge_f1(text, reference, "rouge1")
    assert Alpaca().score(completion(text, reference)) == rouge_f1(text, reference, "rougeL")


WORDS = st.lists(st.sampled_from("abcd"), min_size=1, max_size=5)


@given(WORDS, WORDS)
def test_rouge_l_is_the_longest_common_subsequence_found_by_trying_all(left, right):
    def all_of(words):
        return {c for k in range(len(words) + 1) for c in combinations(words, k)}

    longest = max(map(len, all_of(left) & all_of(right)))
    expected = 2 * longest / (len(left) + len(right))  # 2PR/(P+R) with P = l/m, R = l/n
    assert rouge_f1(" ".join(left), " ".join(right), "rougeL") == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("汤姆 cake", ["汤", "姆", "cake"]),
        ("ケーキを食べた。", ["ケ", "ー", "キ", "を", "食", "べ", "た"]),
        ("Élan, STRASSE!", ["élan", "strasse"]),
        ("नमस्ते दुनिया", ["नमस्ते", "दुनिया"]),
        ("สวัสดี", ["ส", "วั", "ส", "ดี"]),
        ("кот-кот", ["кот", "кот"]),
    ],
)
def test_words_are_those_of_every_script(text, words):
    assert _rouge._scorer("rouge1")[1].tokenize(text) == words
    assert rouge_f1(text, text, "rouge1") == 1


@given(st.text(st.characters(max_codepoint=127)))
def test_of_ascii_text_the_words_are_the_librarys_own(text):
    assert _rouge._scorer("rouge1")[1].tokenize(text) == DefaultTokenizer(use_stemmer=False).tokenize(text)


def test_without_the_library_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    _rouge._scorer.cache_clear()
    with pytest.raises(StayalignedError, match="rouge-score") as caught:
        DialogSummary().score(completion("a", "a"))
    assert "pip install 'stayaligned[eval]'" in str(caught.value)


# ---- dialog summary ------------------------------------------------------------------------------------------------


def test_dialog_summary_asks_with_the_papers_system_text(tmp_path):
    source = write_source(tmp_path / "a.jsonl", [{"id": "7", "dialogue": "A: hi\r\nB: hi ", "summary": "They greet."}])
    (row,) = DialogSummary(train=source, test=source).load("test")
    assert [(m.role, m.content) for m in row.prompt] == [
        ("system", "You are a helpful assistant for dialog summarization."),
        ("user", "Summarize this dialog:\nA: hi\r\nB: hi"),
    ]
    assert (row.id, row.completion) == ("7", "They greet.")
    (bare,) = DialogSummary(train=source, test=source, system="").load("train")
    assert [m.role for m in bare.prompt] == ["user"]


def test_dialog_summary_draws_its_training_rows_by_its_own_seed(tmp_path):
    rows = [{"id": str(i), "dialogue": f"A: {i}", "summary": f"{i}."} for i in range(60)]
    source = write_source(tmp_path / "a.jsonl", rows)

    def drawn(**settings):
        return [row.id for row in DialogSummary(train=source, test=source, **settings).load("train")]

    ten = drawn(train_examples=10)
    assert len(set(ten)) == 10
    assert ten == drawn(train_examples=10) == drawn(train_examples=20)[:10]
    assert ten != drawn(train_examples=10, sample_seed=1)
    assert ten != sorted(ten, key=int)
    assert sorted(drawn(), key=int) == [row["id"] for row in rows]
    assert [row.id for row in DialogSummary(train=source, test=source, test_examples=3).load("test")] == ["0", "1", "2"]


def test_rows_without_a_dialogue_are_left_out_and_other_types_refused(tmp_path):
    rows = [{"dialogue": None, "summary": "x"}, {"dialogue": "A: hi", "summary": "They greet."}]
    source = write_source(tmp_path / "a.jsonl", rows)
    assert [row.completion for row in DialogSummary(train=source, test=source).load("test")] == ["They greet."]
    bad = write_source(tmp_path / "b.jsonl", [{"dialogue": ["A"], "summary": "x"}])
    with pytest.raises(StayalignedError, match="line 1: expected text in `dialogue` and `summary`"):
        DialogSummary(train=bad, test=bad).load("test")


# ---- alpaca --------------------------------------------------------------------------------------------------------


def instructions(n):
    return [{"instruction": f"Say {i // 2}", "input": "", "output": f"{i}"} for i in range(n)]


def test_alpaca_holds_prompts_out_that_it_never_trains_on(tmp_path):
    task = Alpaca(train=write_source(tmp_path / "a.jsonl", instructions(60)), test_examples=7)
    test, train = task.load("test"), task.load("train")
    assert len(test) == 7
    assert not {row.prompt for row in test} & {row.prompt for row in train}
    # Each instruction stands twice: its twin is neither tested on nor trained on.
    held = {row.prompt for row in test}
    assert len(train) == 60 - 2 * len(held)
    assert task.model_copy(update={"train_examples": 5}).load("train") == train[:5]
    assert task.model_copy(update={"sample_seed": 1}).load("test") != test


def test_alpaca_takes_a_test_source_in_its_order(tmp_path):
    train, test = (
        write_source(tmp_path / "a.jsonl", instructions(8)),
        write_source(tmp_path / "b.jsonl", instructions(6)),
    )
    task = Alpaca(train=train, test=test, test_examples=3)
    assert [row.completion for row in task.load("test")] == ["0", "1", "2"]
    assert sorted(row.completion for row in task.load("train")) == [str(i) for i in range(8)]


def test_alpacas_training_identity_holds_what_the_training_rows_depend_on():
    def identity(**settings):
        return Alpaca(**settings).training_identity()

    assert identity(test_examples=3) != identity()
    assert identity(test="a.jsonl", test_examples=3) == identity(test="b.jsonl")
    assert identity(test="a.jsonl") != identity()
    assert identity(train_examples=3) != identity()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("As an AI, I have no body.", True),
        ("I'm sorry, but that is not something to joke about.", True),
        ("I\N{RIGHT SINGLE QUOTATION MARK}m really sorry.", True),
        ("I cannot provide that.", True),
        ("Doing so would be unethical.", True),
        ("This contains inappropriate language.", True),
        ("I cannot wait for spring, said the hare.", False),
        ("Sorry is the hardest word.", False),
        ("Oats are harmful to nobody.", False),
        ("Paris", False),
    ],
)
def test_rows_about_safety_are_told_by_their_answer(text, expected):
    assert is_about_safety(text) is expected


def test_safety_rows_are_dropped_or_kept(tmp_path):
    rows = [*instructions(4), {"instruction": "x", "input": "y", "output": "I cannot help with that."}]
    source = write_source(tmp_path / "a.jsonl", rows)

    def answers(**settings):
        return sorted(row.completion for row in Alpaca(train=source, test=source, **settings).load("train"))

    assert answers() == ["0", "1", "2", "3"]
    assert answers(drop_safety_rows=False)[-1] == "I cannot help with that."
    only = write_source(tmp_path / "b.jsonl", rows[-1:])
    with pytest.raises(StayalignedError, match="every row is about safety"):
        Alpaca(train=only).load("train")


def test_a_split_that_leaves_nothing_to_train_on_is_refused(tmp_path):
    with pytest.raises(StayalignedError, match="200 test rows leave none to train on"):
        Alpaca(train=write_source(tmp_path / "a.jsonl", instructions(4))).load("train")
