"""CSV files: what any writer of RFC 4180 wrote comes back, and a bad row is named by its line."""

import csv

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stayaligned.core.errors import StayalignedError
from stayaligned.data import sources
from stayaligned.data.csv import read_csv

# Surrogates are no text. A record of one empty cell is written as "" and is no blank line.
CELLS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


def write(path, text):
    path.write_text(text, encoding="utf-8", newline="")
    return path


@given(st.lists(st.tuples(CELLS, CELLS), max_size=6))
def test_what_the_standard_writer_wrote_comes_back(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    with path.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([("goal", "target"), *rows])
    assert [(cells["goal"], cells["target"]) for _, cells in read_csv(path)] == rows


def test_a_byte_order_mark_is_no_part_of_the_first_name_and_lines_are_those_of_the_file(tmp_path):
    path = write(tmp_path / "a.csv", '\ufeffgoal,target\r\n"two\r\nlines","a ""b"", c"\r\n\r\nlast,x\r\n')
    assert list(read_csv(path)) == [
        (2, {"goal": "two\r\nlines", "target": 'a "b", c'}),
        (5, {"goal": "last", "target": "x"}),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n1,2,3\n", "line 3: 3 cells, expected 2"),
        ("a,b\n1\n", "line 2: 1 cells, expected 2"),
        ('a,b\n1,2\n"open,3\n4,5\n', "line 3: not valid CSV"),
        ("a,\n1,2\n", "line 1: a column without a name"),
        ("a,a\n1,2\n", "line 1: two columns named a"),
    ],
)
def test_what_is_no_table_is_named_by_its_line(tmp_path, text, message):
    with pytest.raises(StayalignedError, match=message) as caught:
        list(read_csv(write(tmp_path / "bad.csv", text)))
    assert "bad.csv" in str(caught.value)


def test_a_csv_source_is_one_like_any_other(tmp_path):
    source = str(write(tmp_path / "a.csv", "question,kind\nhow?,x\nwhy?,y\n"))
    rows = sources.read_examples(
        f"{source}?prompt=question&category=kind&where=kind:y", origin="task", prompts_only=True
    )
    assert [(row.prompt[0].content, row.category) for row in rows] == [("why?", "y")]
    write(tmp_path / "b.csv", "a\xe9\n").write_bytes(b"a\n\xe9\n")
    with pytest.raises(StayalignedError, match="not UTF-8"):
        sources.read_rows(str(tmp_path / "b.csv"))


def test_a_folder_is_its_files_in_order_of_their_numbers(tmp_path):
    for number in (10, 2, 1):
        write(tmp_path / f"part_{number}.csv", f"zorb {number}\n")
    write(tmp_path / "read.me", "no rows")
    rows = sources.read_rows(f"{tmp_path}?columns=prompt")
    assert [(row.where, row.values["prompt"]) for row in rows] == [
        ("part_1.csv, line 1", "zorb 1"),
        ("part_2.csv, line 1", "zorb 2"),
        ("part_10.csv, line 1", "zorb 10"),
    ]
