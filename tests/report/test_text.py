"""Foreign text is made inert: for the eye, for Markdown, for spreadsheets."""

from __future__ import annotations

import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stayaligned.report.text import csv_cell, duration, markdown, number, one_line, percent, points, visible

# Every character, lone surrogates included.
anything = st.text(st.characters(codec=None, categories=None), max_size=60)


@given(anything)
def test_nothing_that_hides_or_reorders_text_stays_unseen(text: str) -> None:
    shown = visible(text)
    shown.encode("utf-8")
    for char in shown:
        assert unicodedata.category(char) not in ("Cc", "Cs", "Zl", "Zp") or char in "\n\t"
        assert unicodedata.bidirectional(char) not in ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")


def test_a_right_to_left_override_and_nul_are_spelled_out() -> None:
    assert visible("a\u202eb\x00\ud800\r\nc") == "a⟦U+202E⟧b⟦U+0000⟧⟦U+D800⟧\nc"


@given(anything)
def test_one_line_is_one_short_line(text: str) -> None:
    line = one_line(text, 20)
    assert len(line) <= 20
    assert len(line.splitlines()) <= 1


@given(anything)
def test_markdown_has_no_live_mark_left(text: str) -> None:
    bare = re.sub(r"\\[\\*_\[\]#~!$]|&#\d+;", "", markdown(text))
    assert not re.search(r"[\\*_\[\]#~!$&<>|`@\n]", bare)
    assert "://" not in bare


@given(anything)
def test_a_cell_never_starts_a_formula(text: str) -> None:
    assert not csv_cell(text).lstrip().startswith(("=", "+", "-", "@", "＝"))
    assert not csv_cell(text).startswith(("\t", "\r"))


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (percent(None), "n/a"),
        (percent(float("nan")), "n/a"),
        (percent(0.0), "0.0 %"),
        (number(0.4123), "41.2"),
        (points(-0.412), "−41.2"),
        (points(0.05), "+5.0"),
        (points(-1e-9), "0.0"),
        (points(None), "n/a"),
        (duration(8.21), "8.2 s"),
        (duration(200), "3 min 20 s"),
        (duration(7500), "2 h 05 min"),
    ],
)
def test_numbers_are_written_plainly(shown: str, expected: str) -> None:
    assert shown == expected
