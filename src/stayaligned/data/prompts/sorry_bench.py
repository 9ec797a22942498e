"""The prompt set SORRY-Bench."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from stayaligned.core.errors import StayalignedError
from stayaligned.data.prompts._sets import TablePrompts
from stayaligned.data.turns import parsed


class SorryBench(TablePrompts):
    """SORRY-Bench: 440 unsafe instructions in 44 categories, in their base form or one of 20 mutations.

    Xie et al.: rows with `question_id`, `category`, `turns` (a list of the user's turns, one in each published row) and
    `prompt_style`. Mutations such as ciphers and translations need completions that are decoded before they are judged,
    which is not done: `style` chooses one, by default the base form. The hub repository is gated (request access on the
    hub, and run `hf auth login`) and has its own license, which forbids to pass the data on.
    """

    name: ClassVar[str] = "sorry_bench"
    paper: ClassVar[str] = "arXiv 2406.14598"

    source: str = "hf://sorry-bench/sorry-bench-202503"
    """Source of rows with `turns` (or `prompt`), `category` and `prompt_style`."""
    style: str = "base"
    """Value of `prompt_style` of the rows to use; rows without this column are all used."""

    def _row(self, values: Mapping[str, Any], where: str) -> dict[str, Any] | None:
        if values.get("prompt_style", self.style) != self.style:
            return None
        return {"prompt": _asked(values, where), "category": str(values.get("category", ""))}


def _asked(values: Mapping[str, Any], where: str) -> str:
    """Return the one turn in `turns`, which a table of text holds as JSON or as Python writes a list."""
    turns = values.get("prompt", values.get("turns"))
    if isinstance(turns, str):
        found = parsed(turns) if turns.lstrip().startswith("[") else None
        turns = found if isinstance(found, list) else [turns]
    if isinstance(turns, list) and len(turns) == 1 and isinstance(turns[0], str):
        return turns[0]
    if isinstance(turns, list) and len(turns) > 1:
        raise StayalignedError(
            f"{where}: `turns` has {len(turns)} turns of the user without the answers between them",
            hint="Write such conversations with their answers, as `messages`, and name the file as `harmful_prompts`.",
        )
    raise StayalignedError(
        f"{where}: expected a column `turns` with a list of one text, found {', '.join(values)}",
        hint="Name the column in the source: file.jsonl?prompt=COLUMN",
    )
