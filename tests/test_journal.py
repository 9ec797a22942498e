"""A journal loses nothing that was added, and drops a line that was torn."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stayaligned.errors import StayalignedError
from stayaligned.journal import Journal
from stayaligned.records import Message


def row(text: str) -> Message:
    return Message(role="user", content=text)


@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=5), torn=st.integers(0, 30))
def test_what_was_added_is_there_again_and_a_torn_line_is_not(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], torn: int
) -> None:
    path = tmp_path_factory.mktemp("journal") / "deep" / "rows"
    with Journal.open(path, Message) as journal:
        assert journal.rows == []
        for text in texts:
            journal.add(row(text))
    rest = row("the line that a kill cut off\u2028").model_dump_json().encode()[:torn]
    path.write_bytes(path.read_bytes() + rest)
    with Journal.open(path, Message) as journal:
        assert journal.rows == [row(text) for text in texts]
        journal.add(row("next"))
    with Journal.open(path, Message) as journal:
        assert journal.rows == [*map(row, texts), row("next")]


def test_a_line_that_was_edited_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    path.write_text('{"role": "user", "content": "a"}\n{"role": 3}\n{"role": "user", "content": "b"}\n')
    with pytest.raises(StayalignedError, match="line 2: not a Message row"), Journal.open(path, Message):
        pass
