"""CSV: records of any writer that follows RFC 4180 are read, and an invalid record is an error that names its line."""

import csv
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stayaligned.core.errors import StayalignedError
from stayaligned.data import sources
from stayaligned.data.csv import parse_csv

# Surrogates are not text. The standard writer writes a record of one empty cell as "", which is not a blank line.
CELLS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


def write(path, text):
    path.write_text(text, encoding="utf-8", newline="")
    return path


@given(st.lists(st.tuples(CELLS, CELLS), max_size=6))
def test_records_of_the_standard_writer_are_read_unchanged(rows):
    stream = io.StringIO(newline="")
    csv.writer(stream).writerows([("goal", "target"), *rows])
    assert [(cells["goal"], cells["target"]) for _, cells in parse_csv(stream.getvalue(), "a.csv")] == rows


def test_a_byte_order_mark_is_not_part_of_the_first_name_and_lines_are_those_of_the_file(tmp_path):
    path = write(tmp_path / "a.csv", '\ufeffgoal,target\r\n"two\r\nlines","a ""b"", c"\r\n\r\nlast,x\r\n')
    assert sources.read_rows(str(path)) == [
        ("line 2", {"goal": "two\r\nlines", "target": 'a "b", c'}),
        ("line 5", {"goal": "last", "target": "x"}),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n1,2,3\n", "line 3: 3 cells, expected 2"),
        ("a,b\n1\n", "line 2: 1 cells, expected 2"),
        ('a,b\n1,2\n"open,3\n4,5\n', "line 3: invalid CSV"),
        ("a,a\n1,2\n", "line 1: several columns named a"),
    ],
)
def test_an_invalid_table_is_an_error_that_names_the_line(text, message):
    with pytest.raises(StayalignedError, match=rf"bad\.csv, {message}"):
        list(parse_csv(text, "bad.csv"))


def test_a_csv_source_has_the_options_of_every_source(tmp_path):
    source = str(write(tmp_path / "a.csv", "question,kind\nhow?,x\nwhy?,y\n"))
    rows = sources.read_examples(
        f"{source}?prompt=question&category=kind&where=kind:y", origin="task", prompts_only=True
    )
    assert [(row.prompt[0].content, row.category) for row in rows] == [("why?", "y")]
    write(tmp_path / "b.csv", "a\xe9\n").write_bytes(b"a\n\xe9\n")
    with pytest.raises(StayalignedError, match="not UTF-8"):
        sources.read_rows(str(tmp_path / "b.csv"))


def test_the_files_of_a_folder_are_read_in_the_order_of_their_numbers(tmp_path):
    for number in (10, 2, 1):
        write(tmp_path / f"part_{number}.csv", f"zorb {number}\n")
    write(tmp_path / "read.me", "no rows")
    rows = sources.read_rows(f"{tmp_path}?columns=prompt")
    assert [(row.where, row.values["prompt"]) for row in rows] == [
        ("part_1.csv, line 1", "zorb 1"),
        ("part_2.csv, line 1", "zorb 2"),
        ("part_10.csv, line 1", "zorb 10"),
    ]
