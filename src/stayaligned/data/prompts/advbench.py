"""AdvBench: harmful behaviors as instructions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from stayaligned.data.prompts._sets import TablePrompts, text_of


class AdvBench(TablePrompts):
    """AdvBench: 520 instructions for harmful behaviors.

    Zou et al., section 3: `harmful_behaviors.csv` with `goal` and `target`; the target, the beginning of a compliant
    answer that their attack aims at, is not used. Many of the instructions ask for nearly the same thing. The hub
    copy is gated (ask for access there, then `hf auth login`), with `prompt` for `goal`. License: MIT.
    """

    name: ClassVar[str] = "advbench"
    paper: ClassVar[str] = "arXiv 2307.15043, section 3"

    source: str = "hf://walledai/AdvBench"
    """Rows with `goal` (or `prompt`)."""

    def _row(self, values: Mapping[str, Any], where: str) -> dict[str, Any] | None:
        return {"prompt": text_of(values, where, "prompt", "goal"), "category": values.get("category")}
