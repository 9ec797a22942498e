"""The common part of tasks whose completion is one of a few labels."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import Completion, Example
from stayaligned.data.sources import Row, build_examples, read_rows
from stayaligned.data.tasks import Split, Task
from stayaligned.data.tasks._scoring import exact_match


class LabelTask(Task):
    """A classification task: an instruction, a text, and labels to choose from; subclasses set the class variables."""

    instruction: ClassVar[str]
    """The request, which precedes the text."""
    text_column: ClassVar[str]
    """The data set's column with the text to classify."""
    labels: ClassVar[tuple[str, ...]]
    """The labels, as the model learns to write them, in the order of the data set's label numbers."""
    alternatives: ClassVar[dict[str, tuple[str, ...]]] = {}
    """Further completions that count as a label, by label."""

    train: str
    """Source of training rows: with the data set's own columns, or with instructions."""
    test: str
    """Source of test rows, in the same format."""
    test_examples: int | None = Field(default=None, ge=1)
    """Number of test rows, the first ones of the source; null takes all."""

    def load(self, split: Split) -> list[Example]:
        """Return the rows in the source's order; instruction and text are one user turn."""
        source = self.train if split == "train" else self.test
        rows = read_rows(source)
        if self.text_column in rows[0].values:
            rows = [self._as_instruction(source, row) for row in rows]
        examples = build_examples(source, rows, origin="task")
        return examples if split == "train" else examples[: self.test_examples]

    def training_identity(self) -> dict[str, Any]:
        """Return the identity without the test rows."""
        return {key: value for key, value in self.identity().items() if key not in ("test", "test_examples")}

    def score(self, completion: Completion) -> float | None:
        """Return 1 if the completion is the label or an alternative, ignoring case and outer white space; else 0."""
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
        copied = {key: row.values[key] for key in ("id", "category") if key in row.values}
        prompt = f"{self.instruction}\n\n{text.strip()}"
        return Row(row.where, {**copied, "prompt": prompt, "completion": self._label(label, f"{source}, {row.where}")})

    def _label(self, label: Any, where: str) -> str:
        by_name = {name.casefold(): name for name in self.labels}
        if isinstance(label, str) and label.strip().casefold() in by_name:
            return by_name[label.strip().casefold()]
        number = self._number(label)
        if number is not None and 0 <= number < len(self.labels):
            return self.labels[number]
        raise StayalignedError(
            f"{where}: label {label!r} is not one of {', '.join(self.labels)} or their numbers from 0",
            hint="Hidden labels (-1) can't be scored; use a split with public labels.",
        )

    @staticmethod
    def _number(label: Any) -> int | None:
        """Return a label's number, which CSV and TSV files have as text, and tables with missing labels as a float."""
        try:
            number = float(label) if isinstance(label, str | int | float) else None
        except ValueError:
            return None
        return int(number) if number is not None and number.is_integer() else None
