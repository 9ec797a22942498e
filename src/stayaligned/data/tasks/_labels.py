"""Tasks that answer with one of a few labels."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import Completion, Example
from stayaligned.data.sources import Row, build_examples, read_rows
from stayaligned.data.tasks import Split, Task
from stayaligned.data.tasks._scoring import exact_match


class LabelTask(Task):
    """An instruction, a text, and labels to choose from; subclasses fill in the class variables."""

    instruction: ClassVar[str]
    text_column: ClassVar[str]
    labels: ClassVar[tuple[str, ...]]
    """In the order of the data set's label numbers; the first spelling is the one that is learned."""
    alternatives: ClassVar[dict[str, tuple[str, ...]]] = {}
    """Other answers that count as a label, by its spelling."""

    train: str
    """Source with the data set's own columns, or with rows that are instructions already."""
    test: str
    test_examples: int | None = Field(default=None, ge=1)
    """The first so many test rows; null takes all."""

    def load(self, split: Split) -> list[Example]:
        """The rows in the source's order; the text follows the instruction in one user turn."""
        source = self.train if split == "train" else self.test
        rows = read_rows(source)
        if self.text_column in rows[0].values:
            rows = [self._as_instruction(source, row) for row in rows]
        examples = build_examples(source, rows, origin="task")
        return examples if split == "train" else examples[: self.test_examples]

    def training_identity(self) -> dict[str, Any]:
        """Without the test rows."""
        return {key: value for key, value in self.identity().items() if key not in ("test", "test_examples")}

    def score(self, completion: Completion) -> float | None:
        """1 if the answer is the label or one of its alternatives, but for case and white space; else 0."""
        others = (
            spellings
            for label, spellings in self.alternatives.items()
            if label.casefold() == completion.reference.strip().casefold()
        )
        return exact_match(completion.text, [completion.reference, *next(others, ())])

    def _as_instruction(self, source: str, row: Row) -> Row:
        text, label = row.values.get(self.text_column), row.values.get("label")
        if not isinstance(text, str):
            raise StayalignedError(f"{source}, {row.where}: `{self.text_column}` is not text")
        kept = {key: row.values[key] for key in ("id", "category") if key in row.values}
        prompt = f"{self.instruction}\n\n{text.strip()}"
        return Row(row.where, {**kept, "prompt": prompt, "completion": self._label(label, f"{source}, {row.where}")})

    def _label(self, label: Any, where: str) -> str:
        by_name = {name.casefold(): name for name in self.labels}
        if isinstance(label, str) and label.strip().casefold() in by_name:
            return by_name[label.strip().casefold()]
        if isinstance(label, int) and 0 <= label < len(self.labels):
            return self.labels[label]
        raise StayalignedError(
            f"{where}: label {label!r} is not one of {', '.join(self.labels)} or their numbers from 0",
            hint="Hidden labels (-1) can't be scored: use a split whose labels are public.",
        )
