"""The prompt set HEx-PHI."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from stayaligned.data.prompts._sets import TablePrompts, text_of, with_options
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
"""Category names by the number in the file's name, `category_7.csv`."""


class HexPhi(TablePrompts):
    """HEx-PHI: 30 instructions for each of 11 categories of a usage policy.

    Qi et al., section 3; Safe LoRA evaluates on it (its reported rates are multiples of 1/330). The hub repository is
    gated (request access on the hub, and run `hf auth login`) and has its own license. It contains one CSV file per
    category, without a header, one instruction per line. Category 2 has been removed, which leaves 300 of the papers'
    330 prompts: compare categories, not totals. `datasets` would use the first instruction of each file as a header, so
    the files are read directly.
    """

    name: ClassVar[str] = "hex_phi"
    paper: ClassVar[str] = "arXiv 2310.03693, section 3"

    source: str = "hf://LLM-Tuning-Safety/HEx-PHI?files=category_*.csv&columns=instruction"
    """Folder of `category_*.csv` without headers, or source of rows with `instruction` (or `prompt`) and `category`."""

    def _read(self) -> list[Row]:
        rows = read_rows(self.source)
        names = list(rows[0].values)
        if any({"instruction", "prompt"} & row.values.keys() for row in rows) or len(names) > 1 or " " not in names[0]:
            return rows
        # One column whose name is a sentence: a file without a header, as published; its first instruction was read as
        # the name.
        return read_rows(with_options(self.source, columns="instruction"))

    def _row(self, values: Mapping[str, Any], where: str) -> dict[str, Any] | None:
        prompt = text_of(values, where, "prompt", "instruction")
        return {"prompt": prompt, "category": values.get("category") or _category_of(where)}


def _category_of(where: str) -> str:
    """Return the category of a row's file: the seventh for "..., category_7.csv, line 3"."""
    number = re.search(r"category_([0-9]+)\.[^/]*, [a-z]+ [0-9]+$", where)
    return CATEGORIES.get(int(number[1]), "") if number else ""
