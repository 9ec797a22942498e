"""HEx-PHI: instructions that break a usage policy, by category of the policy."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from stayaligned.data.prompts._sets import TablePrompts, text_of
from stayaligned.data.sources import Row, read_rows

CATEGORIES = {
    1: "Illegal Activity",
    2: "Child Abuse Content",
    3: "Hate/Harass/Violence",
    4: "Malware",
    5: "Physical Harm",
    6: "Economic Harm",
    7: "Fraud/Deception",
    8: "Adult Content",
    9: "Political Campaigning",
    10: "Privacy Violation",
    11: "Tailored Financial Advice",
}
"""By the number in the file's name, `category_7.csv`."""


class HexPhi(TablePrompts):
    """HEx-PHI: 30 instructions for each of 11 categories of a usage policy.

    Qi et al., section 3; Safe LoRA measures on it (its reported rates are multiples of 1/330). The hub repository is
    gated (ask for access there, then `hf auth login`) under a license of its own, and holds one CSV file a category,
    without a header, one instruction a line. Category 2 is no longer in it, which leaves 300 prompts of the papers'
    330: compare categories, not totals. `datasets` would read the first instruction of each file as its header, so the
    files are read as they stand.
    """

    name: ClassVar[str] = "hex_phi"
    paper: ClassVar[str] = "arXiv 2310.03693, section 3"

    source: str = "hf://LLM-Tuning-Safety/HEx-PHI?files=category_*.csv&columns=instruction"
    """A folder of `category_*.csv` without headers, or rows with `instruction` (or `prompt`) and `category`."""

    def _read(self) -> list[Row]:
        rows = read_rows(self.source)
        if any({"instruction", "prompt"} & row.values.keys() for row in rows) or len(rows[0].values) > 1:
            return rows
        # One unknown column is a file without a header, as published: its first instruction was taken for a name.
        return read_rows(f"{self.source}{'&' if '?' in self.source else '?'}columns=instruction")

    def _row(self, values: Mapping[str, Any], where: str) -> dict[str, Any] | None:
        prompt = text_of(values, where, "prompt", "instruction")
        return {"prompt": prompt, "category": values.get("category") or _category_of(where)}


def _category_of(where: str) -> str:
    """The category that a file's name tells: of "…, category_7.csv, line 3" the seventh."""
    number = re.search(r"category_([0-9]+)\.[^/]*, [a-z]+ [0-9]+$", where)
    return CATEGORIES.get(int(number[1]), "") if number else ""
