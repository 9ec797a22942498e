"""The prompt set WildJailbreak."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from stayaligned.core.errors import StayalignedError
from stayaligned.data.prompts._sets import TablePrompts, text_of

_TYPES = ("adversarial_harmful", "adversarial_benign", "vanilla_harmful", "vanilla_benign")


class WildJailbreak(TablePrompts):
    """WildJailbreak: jailbreak prompts that users wrote, harmful or only similar to them.

    Jiang et al.: the evaluation table has `adversarial`, `label` and `data_type`, 2000 harmful prompts and 210 benign
    ones; the training table, `train/train.tsv`, has `vanilla`, `adversarial`, `completion` and `data_type`, of which
    the completion is not used. `data_type` chooses the rows, and whether the plain request or its jailbreak is asked.
    The hub repository is gated (request access on the hub, and run `hf auth login`). License: ODC-BY. The tables are
    read directly, since `datasets` would take some cells for missing ones.
    """

    name: ClassVar[str] = "wildjailbreak"
    paper: ClassVar[str] = "arXiv 2406.18510"

    source: str = "hf://allenai/wildjailbreak?files=eval/eval.tsv"
    """Source of rows with `adversarial` (or `vanilla`) and `data_type`."""
    data_type: Literal["adversarial_harmful", "adversarial_benign", "vanilla_harmful", "vanilla_benign"] = (
        "adversarial_harmful"
    )
    """Rows to use: harmful ones for `harmful_prompts`, benign ones for `benign_prompts`; the evaluation table has only
    adversarial ones."""

    def _row(self, values: Mapping[str, Any], where: str) -> dict[str, Any] | None:
        found = text_of(values, where, "data_type")
        if found not in _TYPES:
            raise StayalignedError(f"{where}: `data_type` is {found!r}, expected {' or '.join(_TYPES)}")
        if found != self.data_type:
            return None
        return {"prompt": text_of(values, where, found.partition("_")[0]), "category": found}
