"""The user's own rows."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import Completion, Example
from stayaligned.data.sampling import split_held_out
from stayaligned.data.sources import read_examples
from stayaligned.data.tasks import Split, Task
from stayaligned.data.tasks._scoring import contains, exact_match, number_match


class JsonLines(Task):
    """Conversations from a JSONL file or a hub data set, scored by a simple rule."""

    name: ClassVar[str] = "jsonl"

    train: str | None = None
    """Source of rows to learn; may be left out where a task is only measured, as `skills`."""
    test: str | None = None
    """Source of held-out rows; null holds out a share of `train`."""
    held_out_ratio: float = Field(default=0.1, gt=0, lt=1)
    """That share. A row's side depends on its prompt alone, so adding rows moves none."""
    metric: Literal["exact", "number", "contains", "none"] = "exact"
    """Answer equals the reference (but for case), same final number, contains the reference, or not scored."""
    categories: tuple[str, ...] = ()
    """Keep only rows of these categories; empty keeps all."""

    @model_validator(mode="after")
    def _has_a_source(self) -> Self:
        if self.train is None and self.test is None:
            raise ValueError("name `train`, `test` or both")
        return self

    def load(self, split: Split) -> list[Example]:
        """The rows of a split, in the source's order."""
        if split == "test" and self.test is not None:
            return self._read(self.test, prompts_only=self.metric == "none")
        if self.train is None:
            raise StayalignedError("task jsonl: there are no rows to train on", hint="Set `task.train`.")
        rows = self._read(self.train)
        if self.test is not None:
            return rows
        chosen = split_held_out(rows, self.held_out_ratio)[split == "test"]
        if not chosen:
            raise StayalignedError(
                f"{self.train}: of {len(rows)} rows, held_out_ratio = {self.held_out_ratio:g} leaves none to {split}",
                hint="Name a `test` source, or change `held_out_ratio`.",
            )
        return chosen

    def training_identity(self) -> dict[str, Any]:
        """Which test file there is does not matter, but whether there is one: else `train` gives rows away."""
        unread = {"metric", "test", *(["held_out_ratio"] if self.test is not None else [])}
        kept = {key: value for key, value in self.identity().items() if key not in unread}
        return {**kept, "holds_out": self.test is None}

    def score(self, completion: Completion) -> float | None:
        """1 or 0 by the metric; None where the reference is blank or has no number, and for `none`."""
        answer, reference = completion.text, completion.reference
        match self.metric:
            case "exact":
                return exact_match(answer, [reference])
            case "number":
                return number_match(answer, reference)
            case "contains":
                return contains(answer, reference)
            case "none":
                return None

    def _read(self, source: str, *, prompts_only: bool = False) -> list[Example]:
        rows = read_examples(source, origin="task", prompts_only=prompts_only)
        if not self.categories:
            return rows
        kept = [row for row in rows if row.category in self.categories]
        if not kept:
            found = ", ".join(sorted({row.category or "(none)" for row in rows}))
            raise StayalignedError(
                f"{source}: no row is of the categories {', '.join(self.categories)}", hint=f"It has: {found}."
            )
        return kept
