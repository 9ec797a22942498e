"""The prompt set StrongREJECT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from stayaligned.data.prompts._sets import TablePrompts, text_of


class StrongRejectPrompts(TablePrompts):
    """StrongREJECT: 313 forbidden prompts in six categories.

    Souly et al.: the file `strongreject_dataset.csv` with `category`, `source` and `forbidden_prompt`. The hub copy is
    gated (request access on the hub, and run `hf auth login`) and names the column `prompt`. The judge `strong_reject`
    scores completions as the paper does. License: MIT.
    """

    name: ClassVar[str] = "strong_reject"
    paper: ClassVar[str] = "arXiv 2402.10260"

    source: str = "hf://walledai/StrongREJECT"
    """Source of rows with `forbidden_prompt` (or `prompt`) and `category`."""

    def _row(self, values: Mapping[str, Any], where: str) -> dict[str, Any] | None:
        prompt = text_of(values, where, "prompt", "forbidden_prompt")
        return {"prompt": prompt, "category": values.get("category")}
