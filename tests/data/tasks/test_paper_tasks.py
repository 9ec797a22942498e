"""SST-2, AG News and GSM8K: the paper's prompts and metrics, from files in the data sets' own columns."""

import pytest

from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import Completion
from stayaligned.data.tasks import TASKS, Task
from stayaligned.data.tasks.ag_news import AGNews
from stayaligned.data.tasks.alpaca import Alpaca
from stayaligned.data.tasks.dialog_summary import DialogSummary
from stayaligned.data.tasks.gsm8k import GSM8K
from stayaligned.data.tasks.jsonl import JsonLines
from stayaligned.data.tasks.sst2 import SST2
from support.tasks import completion, write_source


def test_sst2_asks_as_the_paper_does(tmp_path):
    source = write_source(tmp_path / "a.jsonl", [{"idx": 3, "sentence": "a fine film ", "label": 1}])
    (row,) = SST2(train=source, test=source).load("train")
    assert row.prompt[0].content == (
        "Analyze the sentiment of the input, and respond only positive or negative\n\na fine film"
    )
    assert (row.completion, row.origin) == ("positive", "task")


def test_ag_news_asks_as_the_paper_does(tmp_path):
    source = write_source(tmp_path / "a.jsonl", [{"text": "Rockets.", "label": n} for n in range(4)])
    rows = AGNews(train=source, test=source, test_examples=3).load("train")
    assert [row.completion for row in rows] == ["World", "Sports", "Business", "Sci/Tech"]
    assert rows[0].prompt[0].content.startswith("Categorize the news article given in the input into one of the 4")
    assert rows[0].prompt[0].content.endswith("World\nSports\nBusiness\nSci/Tech\n\nRockets.")
    assert len(AGNews(train=source, test=source, test_examples=3).load("test")) == 3


def test_gsm8k_asks_as_the_paper_does(tmp_path):
    source = write_source(tmp_path / "a.jsonl", [{"question": "1+1?", "answer": "One and one.\n#### 2"}])
    (row,) = GSM8K(train=source, test=source).load("test")
    assert (row.prompt[0].content, row.completion) == ("1+1?", "One and one.\nThe final answer is: 2")


@pytest.mark.parametrize("name", ["sst2", "ag_news", "gsm8k"])
def test_rows_that_are_instructions_already_are_taken_as_they_stand(tmp_path, name):
    source = write_source(tmp_path / "a.jsonl", [{"instruction": "Say", "input": "yes", "output": "yes"}])
    (row,) = TASKS.parse({"name": name, "train": source, "test": source}).load("train")
    assert (row.prompt[0].content, row.completion) == ("Say\n\nyes", "yes")


def test_a_label_may_be_its_name_and_a_hidden_one_is_refused(tmp_path):
    source = write_source(tmp_path / "a.jsonl", [{"sentence": "x", "label": "Negative"}])
    assert SST2(train=source, test=source).load("test")[0].completion == "negative"
    hidden = write_source(tmp_path / "b.jsonl", [{"sentence": "x", "label": 0}, {"sentence": "y", "label": -1}])
    with pytest.raises(StayalignedError, match=r"b.jsonl, line 2: label -1 is not one of negative, positive"):
        SST2(train=source, test=hidden).load("test")


def test_columns_of_another_type_are_refused_with_the_line(tmp_path):
    with pytest.raises(StayalignedError, match="line 1: `sentence` is not text"):
        SST2(train=write_source(tmp_path / "a.jsonl", [{"sentence": None, "label": 1}]), test="x").load("train")
    with pytest.raises(StayalignedError, match="line 1: expected text in `question` and `answer`"):
        GSM8K(train=write_source(tmp_path / "b.jsonl", [{"question": "q", "answer": 3}]), test="x").load("train")


@pytest.mark.parametrize(
    ("text", "reference", "score"),
    [
        (" Positive\n", "positive", 1),
        ("POSITIVE", "positive", 1),
        ("positive.", "positive", 0),
        ("It is positive", "positive", 0),
        ("negative", "positive", 0),
        ("", "positive", 0),
        ("positive", "", None),
    ],
)
def test_sst2_is_exact_but_for_case_and_white_space(text, reference, score):
    assert SST2().score(completion(text, reference)) == score


@pytest.mark.parametrize(("text", "score"), [("Sci/Tech", 1), ("sci/tech", 1), ("sci", 1), ("tech", 0), ("world", 0)])
def test_ag_news_takes_both_short_and_long_spelling(text, score):
    assert AGNews().score(completion(text, "Sci/Tech")) == score
    assert AGNews().score(completion("sci", "World")) == 0


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("So 3 + 15 = 18.\nThe final answer is: 18", 1),
        ("The final answer is: 18.00 dollars, not 20", 1),
        ("The final answer is: 20 no, The final answer is: 18", 1),
        ("18 apples", 1),
        ("3 and then 18", 1),
        ("20-18", 1),
        ("The final answer is: none of 18", 1),
        ("The final answer is unknown, 18", 1),
        ("18 or 19", 0),
        ("-18", 0),
        ("118", 0),
        ("no idea", 0),
    ],
)
def test_gsm8k_compares_the_final_number(text, score):
    assert GSM8K().score(completion(text, "Steps 1, 2.\nThe final answer is: 18")) == score


def test_numbers_are_compared_exactly_with_their_thousands():
    assert GSM8K().score(completion("1,234,567.50", "The final answer is: 1234567.5")) == 1
    assert GSM8K().score(completion("0.30000000000000004", "0.3")) == 0


def test_a_reference_without_a_number_is_unscored():
    assert GSM8K().score(completion("3", "none")) is None


@pytest.mark.parametrize(
    "thought", ["", "<think>\n\n</think>\n\n", "<think>\nnegative? 7?\n</think>\n\n", "12\n</think>\n"]
)
@pytest.mark.parametrize(
    ("task", "answer"),
    [
        (SST2(train="x", test="x"), "positive"),
        (GSM8K(train="x", test="x"), "So 3. The final answer is: 3"),
        (JsonLines(test="x", metric="contains"), "positive"),
        (JsonLines(test="x", metric="number"), "3"),
        (Alpaca(train="x"), "a very long word"),
        (DialogSummary(train="x", test="x"), "a very long word"),
    ],
)
def test_the_final_answer_is_scored_whatever_was_thought(task: Task, answer: str, thought: str) -> None:
    row = Completion(id="1", prompt_set="task", prompt=(), text=thought + answer, reference=answer)
    assert task.score_answer(row) == 1.0
    cut = row.model_copy(update={"text": f"<think>\n{answer}", "finished": False})
    assert task.score_answer(cut) is None


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("train.tsv", 'sentence\tlabel\n"a film , half quoted \t1\nbad\t0\n'),
        ("train.csv", 'sentence,label\n"""a film , half quoted",1\nbad,0\n'),
        ("train.csv", ',sentence,label,idx\n0,"""a film , half quoted",1.0,0\n1,bad,0.0,1\n'),
        ("train.jsonl", '{"sentence": "\\"a film , half quoted", "label": 1.0}\n{"sentence": "bad", "label": "0"}\n'),
    ],
)
def test_a_labels_number_may_be_text_or_a_float_as_files_have_it(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    rows = SST2(train=str(tmp_path / name), test="x").load("train")
    assert [row.completion for row in rows] == ["positive", "negative"]
    assert rows[0].prompt[0].content.endswith('\n\n"a film , half quoted')
