"""The prompt set HarmBench."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from stayaligned.data.prompts._sets import TablePrompts, text_of

_CONTEXT = "{context}\n\n---\n\n{behavior}"


class HarmBench(TablePrompts):
    """HarmBench: textual behaviors, standard (200) or contextual (100).

    Mazeika et al., section 4: the file `harmbench_behaviors_text_all.csv` with `Behavior`, `FunctionalCategory`
    (standard, contextual, copyright), `SemanticCategory` and `ContextString`. The prompt of a contextual behavior is
    its context, a rule, and the behavior. The third kind, copyright, is skipped: it is judged by comparison with the
    protected text, not by a judge of harm. The hub copy is gated, has `prompt`, `context` and `category`, and one
    configuration per kind. License: MIT.
    """

    name: ClassVar[str] = "harmbench"
    paper: ClassVar[str] = "arXiv 2402.04249, section 4"

    source: str = "hf://walledai/HarmBench?config=standard"
    """Source of rows with `Behavior` (or `prompt`) and, if contextual, `ContextString` (or `context`)."""
    kind: Literal["standard", "contextual", "both"] = "standard"
    """Kind of behaviors to use; for the hub copy, also set the configuration in `source`."""

    def _row(self, values: Mapping[str, Any], where: str) -> dict[str, Any] | None:
        behavior = text_of(values, where, "prompt", "Behavior")
        context = str(values.get("ContextString") or values.get("context") or "").strip()
        kind = values.get("FunctionalCategory") or ("contextual" if context else "standard")
        if kind not in ("standard", "contextual") or self.kind not in ("both", kind):
            return None
        prompt = _CONTEXT.format(context=context, behavior=behavior) if context else behavior
        return {"prompt": prompt, "category": values.get("SemanticCategory", values.get("category"))}
