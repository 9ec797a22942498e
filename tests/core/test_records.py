"""Rows are read as they were written; a damaged row is an error that names the file and the line."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import Example, Message, read_jsonl, write_jsonl

texts = st.text(st.characters(exclude_categories=["Cs"]))
examples = st.builds(
    Example,
    id=texts,
    prompt=st.lists(st.builds(Message, role=st.just("user"), content=texts), max_size=3).map(tuple),
    completion=texts,
    origin=st.sampled_from(["task", "harmful", "alignment"]),
    category=texts,
)


@given(rows=st.lists(examples, max_size=5))
def test_any_text_survives_a_round_trip(rows: list[Example], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "rows.jsonl"
    write_jsonl(path, rows)
    assert read_jsonl(path, Example) == rows


@pytest.mark.parametrize("line", ['{"id": "x"', "[]", '{"id": "x", "prompt": [], "colour": "red"}'])
def test_a_damaged_row_is_an_error_that_names_file_and_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id": "ok", "prompt": []}\n\n' + line + "\n")
    with pytest.raises(StayalignedError, match=r"rows\.jsonl, line 3"):
        read_jsonl(path, Example)
