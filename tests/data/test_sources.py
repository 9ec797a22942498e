"""Sources in every format, and the error for each that is invalid; sampling, held-out splits and overlaps."""

import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import Example, Message
from stayaligned.data import sampling, sources

USER = {"role": "user", "content": "hello"}
ANSWER = {"role": "assistant", "content": "hi"}


def write(path, rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


def read(path, rows, **options):
    return sources.read_examples(write(path, rows), **{"origin": "task", **options})


def example(text, key="x"):
    return Example(id=key, prompt=(Message(role="user", content=text),))


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, ANSWER]},
        {"prompt": "hello", "completion": "hi"},
        {"prompt": [USER], "completion": "hi"},
        {"prompt": [USER], "completion": [ANSWER]},
        {"instruction": "hello", "input": "", "output": "hi"},
        {"instruction": "hello", "output": "hi"},
    ],
)
def test_every_format_gives_the_same_example(tmp_path, row):
    (found,) = read(tmp_path / "a.jsonl", [row], origin="alignment")
    assert found.prompt == (Message(role="user", content="hello"),)
    assert (found.completion, found.origin) == ("hi", "alignment")
    (reference,) = read(tmp_path / "b.jsonl", [{"prompt": "hello", "completion": "hi"}])
    assert found.id == reference.id


def test_alpaca_joins_instruction_and_input_into_one_turn(tmp_path):
    (found,) = read(tmp_path / "a.jsonl", [{"instruction": "Translate.\n", "input": "chien", "output": "dog"}])
    assert [m.content for m in found.prompt] == ["Translate.\n\nchien"]


def test_the_last_assistant_turn_is_the_completion_and_earlier_turns_are_context(tmp_path):
    (found,) = read(tmp_path / "a.jsonl", [{"messages": [USER, ANSWER, USER, {"role": "assistant", "content": "bye"}]}])
    assert [m.role for m in found.prompt] == ["user", "assistant", "user"]
    assert found.completion == "bye"


def test_a_system_column_becomes_the_first_turn(tmp_path):
    (found,) = read(tmp_path / "a.jsonl", [{"prompt": "hello", "completion": "hi", "system": "Be kind."}])
    assert [(m.role, m.content) for m in found.prompt] == [("system", "Be kind."), ("user", "hello")]
    double = {"messages": [{"role": "system", "content": "x"}, USER, ANSWER], "system": "y"}
    with pytest.raises(StayalignedError, match=r"line 1: both a `system` column and a system turn"):
        read(tmp_path / "b.jsonl", [double])


@pytest.mark.parametrize("row", [{"prompt": "hello"}, {"messages": [USER]}, {"instruction": "hello"}])
def test_a_prompt_without_a_completion_is_allowed_only_in_prompt_sets(tmp_path, row):
    (found,) = read(tmp_path / "a.jsonl", [row], prompts_only=True)
    assert (found.prompt[-1].content, found.completion) == ("hello", "")
    with pytest.raises(StayalignedError, match="line 1: no completion to learn"):
        read(tmp_path / "a.jsonl", [row])


def test_json_lists_blank_lines_byte_order_marks_and_line_separators_in_text_are_read(tmp_path):
    rows = [{"prompt": "a\u2028b", "completion": "c"}, {"prompt": "d", "completion": "e"}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    text = "\ufeff" + "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\r\n"
    (tmp_path / "a.jsonl").write_text(text, encoding="utf-8", newline="")
    from_list = sources.read_examples(str(tmp_path / "a.json"), origin="task")
    assert from_list == sources.read_examples(str(tmp_path / "a.jsonl"), origin="task")
    assert from_list[0].prompt[0].content == "a\u2028b"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], ": no rows"),
        (["", "  "], ": no rows"),
        ([{"prompt": "a", "completion": "b"}, '{"prompt": '], r"line 2: invalid JSON"),
        (["[1, 2]"], r"line 1: expected an object, found list"),
        ([{"ask": "a", "completion": "b"}], r"line 1: expected `messages`, `prompt` or `instruction`, found `ask"),
        (
            [{"prompt": "a", "completion": "b"}, {"messages": [USER]}],
            r"mixed formats: line 1 .*`prompt`, line 2 .*`mes",
        ),
        ([{"prompt": 3, "completion": "b"}], r"line 1: `prompt` is of type int, expected text"),
        ([{"prompt": "a", "completion": 3}], r"line 1: `completion` is of type int, expected text"),
        ([{"prompt": "a", "completion": [USER]}], r"expected text or one assistant turn"),
        ([{"messages": []}], r"line 1: no completion to learn, only `messages`"),
        ([{"messages": [{"role": "tool", "content": "x"}]}], r"turn 1: expected a role"),
        (
            [{"messages": [{"role": "user", "content": [{"type": "text"}]}]}],
            r"turn 1: `content`, part 1: expected text, found no text",
        ),
        ([{"messages": [ANSWER]}], r"all 1 rows have a blank prompt or completion"),
        ([{"messages": [USER, ANSWER, ANSWER]}], r"line 1: expected a user's turn"),
        (
            [{"prompt": " ", "completion": "b"}, {"prompt": "a", "completion": ""}],
            r"all 2 rows have a blank prompt or compl",
        ),
        (
            [{"prompt": "a", "completion": "b", "id": "x"}, {"prompt": "c", "completion": "d", "id": "x"}],
            "same id, 'x'",
        ),
        ([{"prompt": "a", "completion": "b", "id": 1.5}], r"`id` is of type float"),
    ],
)
def test_an_invalid_row_is_an_error_that_names_its_line(tmp_path, rows, message):
    with pytest.raises(StayalignedError, match=message) as caught:
        read(tmp_path / "rows.jsonl", rows)
    assert "rows.jsonl" in str(caught.value)


def test_a_missing_file_an_empty_folder_and_other_encodings_are_errors(tmp_path):
    with pytest.raises(StayalignedError, match="no such file"):
        sources.read_examples("nowhere.jsonl", origin="task")
    (tmp_path / "notes.txt").write_text("not rows")
    with pytest.raises(StayalignedError, match=r"no \.jsonl, .* or \.arrow file in this folder"):
        sources.read_examples(str(tmp_path), origin="task")
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "é"}'.encode("latin-1"))
    with pytest.raises(StayalignedError, match="not UTF-8"):
        sources.read_examples(str(tmp_path / "latin.jsonl"), origin="task")


def test_blank_rows_are_skipped_and_counted(tmp_path, caplog):
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": " "}]
    assert len(read(tmp_path / "a.jsonl", rows)) == 1
    assert "skipped 1 of 2 rows" in caplog.text
    assert len(read(tmp_path / "a.jsonl", rows, prompts_only=True)) == 2


@pytest.mark.parametrize("blank", ["\u200b", "\ufeff \u2060", "\u3164", "\u200b\ufe0f", "\u2800", "\x00"])
def test_a_prompt_that_shows_nothing_is_blank(tmp_path, caplog, blank):
    rows = [{"prompt": text, "completion": "b"} for text in (blank, "a\u200b", "\u2764\ufe0f", "·")]
    assert len(read(tmp_path / "a.jsonl", rows, prompts_only=True)) == 3
    assert "skipped 1 of 4 rows" in caplog.text


def test_ids_are_given_or_computed_from_content_and_do_not_depend_on_the_order(tmp_path):
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}, {"prompt": "a", "completion": "b"}]
    first = read(tmp_path / "a.jsonl", rows)
    assert len({e.id for e in first}) == 3
    assert first[2].id == f"{first[0].id}-2"
    moved = read(tmp_path / "b.jsonl", [rows[1], rows[0], {"prompt": "new", "completion": "x"}])
    assert [e.id for e in moved[:2]] == [first[1].id, first[0].id]
    assert read(tmp_path / "c.jsonl", [{"id": 7, **rows[0]}])[0].id == "7"


def test_source_options_rename_columns_and_filter_rows(tmp_path):
    rows = [
        {"prompt": "a", "response": "b", "is_safe": True, "category": {"x": False, "y": True, "z": True}},
        {"prompt": "c", "response": "d", "is_safe": False, "category": "w"},
    ]
    source = write(tmp_path / "beaver.jsonl", rows) + "?completion=response"
    assert [e.category for e in sources.read_examples(source, origin="task")] == ["y,z", "w"]
    (unsafe,) = sources.read_examples(f"{source}&where=is_safe:false", origin="harmful")
    assert (unsafe.completion, unsafe.origin) == ("d", "harmful")
    with pytest.raises(StayalignedError, match="no row passes"):
        sources.read_rows(f"{source}&where=is_safe:false&where=category:v")


def test_a_renamed_column_replaces_a_column_that_has_the_name(tmp_path):
    source = write(tmp_path / "a.jsonl", [{"prompt": "short", "question": "long", "completion": "b"}])
    assert sources.read_examples(f"{source}?prompt=question", origin="task")[0].prompt[0].content == "long"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("?colum=x", "no source option 'colum'"),
        ("?split=train", "no source option 'split'"),
        ("?where=is_safe", "is not a filter"),
        ("?where=is_saef:true", "no column 'is_saef'"),
        ("?completion=respnse", "no column 'respnse'"),
    ],
)
def test_an_invalid_source_option_is_an_error_that_names_it(tmp_path, options, message):
    source = write(tmp_path / "a.jsonl", [{"prompt": "a", "response": "b", "is_safe": True}])
    with pytest.raises(StayalignedError, match=message):
        sources.read_examples(source + options, origin="task")


def test_a_file_name_may_contain_a_question_mark(tmp_path):
    assert len(read(tmp_path / "why?x=1.jsonl", [{"prompt": "a", "completion": "b"}])) == 1


# ---- the hub -------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """An empty cache of hub data sets, and a function that adds one as `datasets` itself would."""
    import datasets
    from datasets.utils import logging

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    logging.set_verbosity_error()
    datasets.disable_progress_bars()

    def add(name, rows):
        info = datasets.DatasetInfo(builder_name="json", config_name="default", version="0.0.0")
        place = tmp_path / "cache" / name.replace("/", "___") / "default" / "0.0.0" / ("a" * 40)
        table = datasets.Dataset.from_list(rows, info=info)
        place.mkdir(parents=True)
        writer = datasets.arrow_writer.ArrowWriter(
            path=str(place / f"{name.partition('/')[2]}-train.arrow"), features=table.features
        )
        for row in table:
            writer.write(row)
        size, _ = writer.finalize()
        writer.close()
        info.features = table.features
        info.dataset_name = name.partition("/")[2]
        info.splits = {"train": datasets.SplitInfo("train", size, len(rows), dataset_name=info.dataset_name)}
        info.write_to_directory(str(place))

    return add


def test_a_hub_data_set_is_read_from_the_local_cache(hub_cache):
    hub_cache("owner/toy", [{"prompt": "a", "response": "b"}, {"prompt": "c", "response": "d"}])
    found = sources.read_examples("hf://owner/toy?split=train&completion=response", origin="task")
    assert [(e.prompt[0].content, e.completion) for e in found] == [("a", "b"), ("c", "d")]


def test_a_hub_data_set_that_is_not_cached_is_an_error_offline(hub_cache):
    with pytest.raises(StayalignedError, match="can't load the data set") as caught:
        sources.read_examples("hf://owner/absent?split=test", origin="task")
    assert "HF_HUB_OFFLINE" in str(caught.value)
    assert "hf://owner/absent" in str(caught.value)


# ---- sampling, splitting, overlap ----------------------------------------------------------------------------------


@given(st.integers(0, 2**32), st.integers(0, 20), st.integers(0, 20))
def test_samples_are_without_replacement_seeded_and_nested(seed, n, m):
    rows = [example(str(i), str(i)) for i in range(20)]
    found = sampling.sample(rows, n, random.Random(seed))
    assert len({e.id for e in found}) == n
    assert found == sampling.sample(rows, n, random.Random(seed))
    assert sampling.sample(rows, m, random.Random(seed))[: min(n, m)] == found[: min(n, m)]


def test_a_sample_larger_than_the_rows_is_an_error():
    with pytest.raises(StayalignedError, match=r"3 rows: there are only 2"):
        sampling.sample([example("a"), example("b")], 3, random.Random(0))


@given(st.lists(st.text(max_size=8), max_size=60), st.lists(st.text(max_size=8), max_size=20), st.floats(0, 1))
def test_a_held_out_split_does_not_change_when_rows_are_added_and_never_separates_equal_prompts(texts, more, ratio):
    rows = [example(text, str(i)) for i, text in enumerate(texts)]
    train, test = sampling.split_held_out(rows, ratio)
    assert sorted(map(id, train + test)) == sorted(map(id, rows))
    assert not {e.prompt[0].content for e in train} & {e.prompt[0].content for e in test}
    longer = sampling.split_held_out(rows + [example(text) for text in more], ratio)
    assert (longer[0][: len(train)], longer[1][: len(test)]) == (train, test)


def test_a_held_out_split_has_about_the_given_share():
    _, test = sampling.split_held_out([example(f"row {i}") for i in range(4000)], 0.25)
    assert len(test) / 4000 == pytest.approx(0.25, abs=0.03)


def test_overlaps_ignore_case_punctuation_and_small_edits():
    train = [example("How do I open the old oak door, please?", "t"), example("something else entirely here", "u")]
    same = example("how do i open the old OAK door please", "e")
    near = example("how do I open the old oak door please now", "f")
    far = example("how do I close the tiny window over there", "g")
    assert sampling.find_overlaps(train, [same, near, far]) == [("t", "e", 1.0), ("t", "f", pytest.approx(7 / 8))]
    assert sampling.find_overlaps(train, [same, near, far], similarity=1.0) == [("t", "e", 1.0)]


@given(
    st.lists(st.lists(st.sampled_from("abcd"), min_size=1, max_size=9), max_size=12),
    st.lists(st.lists(st.sampled_from("abcd"), min_size=1, max_size=9), max_size=12),
    st.sampled_from([0.2, 0.5, 0.8, 1.0]),
)
def test_the_indexed_search_finds_what_comparing_all_pairs_finds(left, right, similarity):
    def triples(words):
        return {" ".join(words[i : i + 3]) for i in range(max(1, len(words) - 2))}

    expected = {
        (str(i), str(j))
        for i, x in enumerate(left)
        for j, y in enumerate(right)
        if len(triples(x) & triples(y)) >= similarity * len(triples(x) | triples(y)) - 1e-9
    }
    train = [example(" ".join(words), str(i)) for i, words in enumerate(left)]
    evaluation = [example(" ".join(words), str(j)) for j, words in enumerate(right)]
    assert {o[:2] for o in sampling.find_overlaps(train, evaluation, similarity=similarity)} == expected


def test_half_of_a_surrogate_pair_is_an_error_that_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a\\ud800", "completion": "b"}\n')
    with pytest.raises(StayalignedError, match=r"line 2: `prompt` contains half of a surrogate pair"):
        sources.read_examples(str(path), origin="task")
