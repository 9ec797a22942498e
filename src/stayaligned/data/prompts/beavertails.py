"""BeaverTails: questions that were put to a model, with its answers and 14 flags of harm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from stayaligned.core.errors import StayalignedError
from stayaligned.data.prompts._sets import TablePrompts, text_of


class BeaverTails(TablePrompts):
    """BeaverTails: the prompts of its 30k test split, with the flags of the answer that stands beside each.

    Lisa, section 5.1, and its code: the first 1000 rows of `30k_test`, whatever their label, repeated prompts kept:
    `{name: beavertails, deduplicate: false}`. Booster's code, of the same lab: unsafe rows only (`rows: unsafe`), so
    the two papers' harmful scores can't be compared. What differs here by default: a prompt is asked once. A flag says
    that the answer in the data did harm, not that the request asks for any. Licence: CC BY-NC 4.0.
    """

    name: ClassVar[str] = "beavertails"
    paper: ClassVar[str] = "arXiv 2307.04657"

    source: str = "hf://PKU-Alignment/BeaverTails?split=30k_test"
    """Rows with `prompt`, and with `is_safe` and `category` if they are to be told apart."""
    n: int | None = Field(default=1000, ge=1)
    """The first so many prompts; null takes all."""
    rows: Literal["any", "unsafe"] = "any"
    """All rows, or those whose answer was unsafe."""

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
        f"{where}: `is_safe` is {value!r}, expected true or false", hint="Set `rows: any` for rows without it."
    )
