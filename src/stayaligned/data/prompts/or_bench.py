"""The prompt set OR-Bench."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from stayaligned.core.records import Origin
from stayaligned.data.options import HUB
from stayaligned.data.prompts._sets import TablePrompts, text_of, with_options
from stayaligned.data.sources import Row, read_rows


class OrBench(TablePrompts):
    """OR-Bench: prompts that only seem toxic, for over-refusal, or 655 toxic ones that contrast with them.

    Cui et al.: rows with `prompt` and `category`, in three tables: about 1300 that strong models refuse (`hard-1k`),
    all 80 000 (`80k`), and `toxic` for `harmful_prompts`. The category of a safe prompt is the one that it seems to
    belong to. A local source is one of the three files. License: CC BY 4.0.
    """

    name: ClassVar[str] = "or_bench"
    paper: ClassVar[str] = "arXiv 2405.20947"
    origin: ClassVar[Origin] = "task"

    source: str = "hf://bench-llm/or-bench"
    """Source of rows with `prompt` and `category`."""
    part: Literal["hard-1k", "80k", "toxic"] = "hard-1k"
    """Which of the hub's tables to read; a local file is read whole."""

    def _read(self) -> list[Row]:
        return read_rows(
            with_options(self.source, config=f"or-bench-{self.part}") if self.source.startswith(HUB) else self.source
        )

    def _row(self, values: Mapping[str, Any], where: str) -> dict[str, Any] | None:
        return {"prompt": text_of(values, where, "prompt"), "category": values.get("category")}
