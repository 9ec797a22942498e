"""The prompt set BeaverTails."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from stayaligned.core.errors import StayalignedError
from stayaligned.data.prompts._sets import TablePrompts, text_of


class BeaverTails(TablePrompts):
    """BeaverTails: the prompts of its 30k test split, with the harm categories of the completion in the data.

    Lisa, section 5.1, and its code: the first 1000 rows of `30k_test` with any label, including repeated prompts:
    `{name: beavertails, deduplicate: false}`. Booster's code, from the same lab: unsafe rows only (`rows: unsafe`), so
    the harmful scores of the two papers can't be compared. Differs by default: each prompt is used once. A category
    means that the completion in the data is harmful, not necessarily the prompt. License: CC BY-NC 4.0.
    """

    name: ClassVar[str] = "beavertails"
    paper: ClassVar[str] = "arXiv 2307.04657"

    source: str = "hf://PKU-Alignment/BeaverTails?split=30k_test"
    """Source of rows with `prompt`; `is_safe` is needed for `rows: unsafe`, `category` is optional."""
    n: int | None = Field(default=1000, ge=1)
    """Number of prompts, the first ones of the source; null takes all."""
    rows: Literal["any", "unsafe"] = "any"
    """Which rows to use: any, or those with an unsafe completion."""

    def _row(self, values: Mapping[str, Any], where: str) -> dict[str, Any] | None:
        if self.rows == "unsafe" and _is_safe(values.get("is_safe"), where):
            return None
        return {"prompt": text_of(values, where, "prompt"), "category": values.get("category")}


def _is_safe(value: Any, where: str) -> bool:
    read = value.strip().lower() if isinstance(value, str) else value
    if read in (True, "true", "1"):
        return True
    if read in (False, "false", "0"):
        return False
    raise StayalignedError(
        f"{where}: `is_safe` is {value!r}, expected true or false",
        hint="Set `rows: any` for a source without `is_safe`.",
    )
