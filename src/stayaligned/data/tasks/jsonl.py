"""The task of the user's own rows."""

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
    """The user's own rows, from a file or a hub data set, scored by a simple rule."""

    name: ClassVar[str] = "jsonl"

    train: str | None = None
    """Source of training rows; not needed for a task that is only measured, such as `skills`."""
    test: str | None = None
    """Source of test rows; null holds out a share of `train`."""
    held_out_ratio: float = Field(default=0.1, gt=0, lt=1)
    """Share of `train` to hold out for testing. A row's split depends on its prompt alone: adding rows moves none."""
    metric: Literal["exact", "number", "contains", "none"] = "exact"
    """Score of a completion: equals the reference (ignoring case), has the same final number, contains it, or none."""
    categories: tuple[str, ...] = ()
    """Categories of the rows to use; empty for all."""

    @model_validator(mode="after")
    def _has_a_source(self) -> Self:
        if self.train is None and self.test is None:
            raise ValueError("set `train`, `test` or both")
        return self

    def load(self, split: Split) -> list[Example]:
        """Return the rows of a split, in the source's order."""
        if split == "test" and self.test is not None:
            return self._read(self.test, prompts_only=self.metric == "none")
        if self.train is None:
            raise StayalignedError("task jsonl: no training rows", hint="Set `task.train` to their source.")
        rows = self._read(self.train)
        if self.test is not None:
            return rows
        chosen = split_held_out(rows, self.held_out_ratio)[split == "test"]
        if not chosen:
            raise StayalignedError(
                f"{self.train}: of {len(rows)} rows, held_out_ratio = {self.held_out_ratio:g} leaves none to {split}",
                hint="Set a `test` source, or change `held_out_ratio`.",
            )
        return chosen

    def training_identity(self) -> dict[str, Any]:
        """Return the identity without what only testing reads, and whether `train` provides the test rows."""
        unread = {"metric", "test", *(["held_out_ratio"] if self.test is not None else [])}
        read = {key: value for key, value in self.identity().items() if key not in unread}
        return {**read, "holds_out": self.test is None}

    def score(self, completion: Completion) -> float | None:
        """Return 1 or 0 by the metric; None if the reference is blank or has no number, and for `none`."""
        text, reference = completion.text, completion.reference
        match self.metric:
            case "exact":
                return exact_match(text, [reference])
            case "number":
                return number_match(text, reference)
            case "contains":
                return contains(text, reference)
            case "none":
                return None

    def _read(self, source: str, *, prompts_only: bool = False) -> list[Example]:
        rows = read_examples(source, origin="task", prompts_only=prompts_only)
        if not self.categories:
            return rows
        chosen = [row for row in rows if row.category in self.categories]
        if not chosen:
            found = ", ".join(sorted({row.category or "(none)" for row in rows}))
            raise StayalignedError(
                f"{source}: no row has one of the categories {', '.join(self.categories)}",
                hint=f"Its categories: {found}.",
            )
        return chosen
