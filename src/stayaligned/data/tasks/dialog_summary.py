"""Summaries of chats."""

from __future__ import annotations

import random
from typing import Any, ClassVar

from pydantic import Field

from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import Completion, Example
from stayaligned.data.sources import Row, build_examples, read_rows
from stayaligned.data.tasks import Split, Task
from stayaligned.data.tasks._rouge import rouge_f1


class DialogSummary(Task):
    """Dialog Summary: SAMSum's chats, summarized in a sentence or two; ROUGE-1 F1.

    Safe LoRA, section 4 and A.1: 1000 random training rows, 200 test rows, its system text, ROUGE-1 F1. The paper
    does not say which rows: here a draw by `sample_seed`, and the first 200 test rows. Its user text is not in
    our facts of the paper; "Summarize this dialog:" is what public code with that system text uses. What differs: the
    words of ROUGE are Unicode's (the same for English text). SAMSum's own hub repository needs a script, which
    `datasets` no longer runs; the default is a copy of its rows. Licence of SAMSum: CC BY-NC-ND 4.0.
    """

    name: ClassVar[str] = "dialog_summary"
    paper: ClassVar[str] = "arXiv 2405.16833, section 4"

    train: str = "hf://knkarthick/samsum?split=train"
    """Source with `dialogue` and `summary`, or with rows that are instructions already."""
    test: str = "hf://knkarthick/samsum?split=test"
    train_examples: int | None = Field(default=1000, ge=1)
    """At most so many training rows, drawn by `sample_seed`; null takes all."""
    test_examples: int | None = Field(default=200, ge=1)
    """The first so many test rows; null takes all."""
    system: str = "You are a helpful assistant for dialog summarization."
    """The system text before each dialog; empty leaves it out."""
    sample_seed: int = 0
    """Draws the training rows; not the experiment's seed, so that its seeds share them."""

    def load(self, split: Split) -> list[Example]:
        """Training rows in drawn order, test rows in the source's."""
        source = self.train if split == "train" else self.test
        rows = read_rows(source)
        if any("dialogue" in row.values for row in rows):
            rows = [self._as_instruction(source, row) for row in rows]
        examples = build_examples(source, rows, origin="task")
        if split == "test":
            return examples[: self.test_examples]
        random.Random(f"{self.sample_seed}:dialog_summary").shuffle(examples)  # noqa: S311
        return examples[: self.train_examples]

    def training_identity(self) -> dict[str, Any]:
        """Without the test rows."""
        return {key: value for key, value in self.identity().items() if key not in ("test", "test_examples")}

    def score(self, completion: Completion) -> float | None:
        """ROUGE-1 F1, 0 to 1; None if the reference has no words."""
        return rouge_f1(completion.text, completion.reference, "rouge1")

    def _as_instruction(self, source: str, row: Row) -> Row:
        dialogue, summary = row.values.get("dialogue"), row.values.get("summary")
        if not isinstance(dialogue, str | None) or not isinstance(summary, str | None):
            raise StayalignedError(f"{source}, {row.where}: expected text in `dialogue` and `summary`")
        kept = {key: row.values[key] for key in ("id", "category") if key in row.values}
        # A few rows of the copy on the hub have no dialogue: blank rows are left out and counted.
        asked = f"Summarize this dialog:\n{dialogue.strip()}" if dialogue and dialogue.strip() else ""
        return Row(row.where, {**kept, "system": self.system, "prompt": asked, "completion": summary or ""})
