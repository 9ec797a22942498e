"""The prompt set JailbreakBench."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from stayaligned.data.options import HUB
from stayaligned.data.prompts._sets import TablePrompts, text_of, with_options
from stayaligned.data.sources import Row, read_rows


class JailbreakBench(TablePrompts):
    """JailbreakBench: 100 harmful behaviors, or the 100 benign ones on the same subjects.

    Chao et al., JBB-Behaviors: two tables with `Index`, `Goal`, `Target`, `Behavior`, `Category` and `Source`. Use
    `half: harmful` for `harmful_prompts` and `half: benign` for `benign_prompts`. The target, the beginning of a
    compliant completion, is not used. A local source is one of the two files, `harmful-behaviors.csv` or
    `benign-behaviors.csv`, or the folder of both. License: MIT.
    """

    name: ClassVar[str] = "jailbreakbench"
    paper: ClassVar[str] = "arXiv 2404.01318"

    source: str = "hf://JailbreakBench/JBB-Behaviors?config=behaviors"
    """Source of rows with `Goal` (or `prompt`) and `Category`: the hub's set, one of its two files, or their folder."""
    half: Literal["harmful", "benign"] = "harmful"
    """Which behaviors to use: harmful ones, or the benign ones that match them."""

    def _read(self) -> list[Row]:
        if self.source.startswith(HUB):
            return read_rows(with_options(self.source, split=self.half))
        folder = Path(self.source).expanduser().is_dir()
        return read_rows(with_options(self.source, files=f"{self.half}-behaviors.csv") if folder else self.source)

    def _row(self, values: Mapping[str, Any], where: str) -> dict[str, Any] | None:
        prompt = text_of(values, where, "prompt", "Goal")
        return {"prompt": prompt, "category": values.get("Category", values.get("category"))}
