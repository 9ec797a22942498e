"""The prompt set AdvBench."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from stayaligned.data.prompts._sets import TablePrompts, text_of


class AdvBench(TablePrompts):
    """AdvBench: 520 instructions for harmful behaviors.

    Zou et al., section 3: `harmful_behaviors.csv` with `goal` and `target`; the target, the beginning of a compliant
    completion that their attack optimizes for, is not used. Many of the instructions are nearly equal. The hub copy is
    gated (request access on the hub, and run `hf auth login`) and names the column `prompt`. License: MIT.
    """

    name: ClassVar[str] = "advbench"
    paper: ClassVar[str] = "arXiv 2307.15043, section 3"

    source: str = "hf://walledai/AdvBench"
    """Source of rows with `goal` (or `prompt`)."""

    def _row(self, values: Mapping[str, Any], where: str) -> dict[str, Any] | None:
        return {"prompt": text_of(values, where, "prompt", "goal"), "category": values.get("category")}
