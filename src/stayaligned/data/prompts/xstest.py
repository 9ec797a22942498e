"""The prompt set XSTest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import Origin
from stayaligned.data.prompts._sets import TablePrompts, text_of


class XSTest(TablePrompts):
    """XSTest: 250 safe prompts for over-refusal, or the 200 unsafe ones that contrast with them.

    Röttger et al., section 3: the file `xstest_prompts.csv` with `id`, `prompt`, `type`, `label` (safe or unsafe),
    `focus` and `note`. Rows without `label`, as in older copies, are unsafe if their type begins with "contrast". The
    hub copy is gated. License: CC BY 4.0.
    """

    name: ClassVar[str] = "xstest"
    paper: ClassVar[str] = "arXiv 2308.01263, section 3"
    origin: ClassVar[Origin] = "task"

    source: str = "hf://walledai/XSTest?split=test"
    """Source of rows with `prompt`, `type` and `label`."""
    label: Literal["safe", "unsafe"] = "safe"
    """Which prompts to use: safe ones for `benign_prompts`, unsafe ones for `harmful_prompts`."""

    def _row(self, values: Mapping[str, Any], where: str) -> dict[str, Any] | None:
        if _label(values, where) != self.label:
            return None
        return {"prompt": text_of(values, where, "prompt"), "category": values.get("type")}


def _label(values: Mapping[str, Any], where: str) -> str:
    if "label" not in values:
        return "unsafe" if text_of(values, where, "type").startswith("contrast") else "safe"
    label = str(values["label"]).strip().lower()
    if label not in ("safe", "unsafe"):
        raise StayalignedError(f"{where}: `label` is {values['label']!r}, expected safe or unsafe")
    return label
