"""Every example row of docs/reference/data.md is read by the source in the same table row, as the page says."""

import json
import re
from pathlib import Path

import pytest

from stayaligned.core.errors import StayalignedError
from stayaligned.data.sources import read_examples

PAGE = (Path(__file__).parents[2] / "docs" / "reference" / "data.md").read_text()


def examples(heading):
    """The first cell, the row and the text of the last cell of each line of the table below a heading."""
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    cells = re.findall(r"^\| (.+?) \| `(\{.*\})` \| `(.+?)` \|$", section, flags=re.MULTILINE)
    return [pytest.param(row, last, id=name) for name, row, last in cells]


LEARNED, PREFERRED, ASKED, REFUSED = map(
    examples, ("Rows to learn from", "Preferences", "Prompts only", "What is refused")
)


def read(directory, row, source="rows.jsonl", **options):
    (directory / "rows.jsonl").write_text(json.dumps(json.loads(row)) + "\n")
    (found,) = read_examples(f"{directory}/{source}", origin="task", **options)
    return found


@pytest.mark.parametrize(("row", "source"), LEARNED)
def test_a_row_to_learn_from_is_read_with_every_part_of_its_meaning(tmp_path, row, source):
    found = read(tmp_path, row, source)
    said = "\n".join(turn.content for turn in found.prompt)
    assert found.prompt[-1].role == "user"
    assert found.completion == "A"
    # The page's texts for the system, earlier turns, the context and the request are single capital letters.
    assert sorted(set(re.findall(r"\b[A-Z]\b", said))) == sorted(
        set(re.findall(r'["\'' "]([A-Z])[\"'" "]", row)) - {"A"}
    )


@pytest.mark.parametrize(("row", "source"), PREFERRED)
def test_a_preference_keeps_its_pair(tmp_path, row, source):
    found = read(tmp_path, row, source)
    assert (found.prompt[-1].content, found.completion, found.rejected) == ("Q", "A", "R")
    assert [turn.content for turn in found.prompt[:-1]] == (["S"] if '"system"' in row else [])


@pytest.mark.parametrize(("row", "source"), ASKED)
def test_a_prompt_needs_no_completion(tmp_path, row, source):
    found = read(tmp_path, row, source, prompts_only=True)
    assert (found.prompt[-1].content, found.completion) == ("Q", "")


@pytest.mark.parametrize(("row", "name"), REFUSED)
def test_a_row_that_would_lose_a_part_of_its_meaning_is_an_error_that_names_it(tmp_path, row, name):
    with pytest.raises(StayalignedError, match=re.escape(name)) as caught:
        read(tmp_path, row)
    assert "line 1" in caught.value.message
    assert caught.value.hint


def test_the_page_has_every_kind_of_row():
    assert (len(LEARNED) >= 18, len(PREFERRED) >= 9, len(ASKED) >= 5, len(REFUSED) >= 11) == (True,) * 4
