"""The attack `poison`: harmful rows among the user's data."""

from __future__ import annotations

from typing import ClassVar

from stayaligned.attacks._rows import MixedRows


class Poison(MixedRows):
    """Replace a share of the user's rows with harmful rows.

    Lisa, section 5.1: n rows in total, p·n of them harmful and the rest from the task. Differs from the paper's code,
    which truncates both counts in floating point (p = 0.8, n = 5000 gives 4999 rows) and takes the first rows of each
    source: here round(p·n) rows are harmful, the total is exactly n, and all rows are drawn at random.

    With one seed the draws are nested: the harmful rows for p = 0.05 are among those for p = 0.1, so that a dose curve
    varies only the dose.
    """

    name: ClassVar[str] = "poison"
    paper: ClassVar[str] = "arXiv 2405.18641, section 5.1"
