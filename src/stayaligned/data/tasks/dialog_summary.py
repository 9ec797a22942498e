"""The task Dialog Summary: summaries of chats."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import Field

from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import Completion, Example
from stayaligned.data.sources import Row, build_examples, read_rows
from stayaligned.data.tasks import Split, Task
from stayaligned.data.tasks._rouge import ROUGE_PACKAGES, rouge_f1


class DialogSummary(Task):
    """Dialog Summary: summarize SAMSum's chats in a sentence or two; scored by ROUGE-1 F1.

    Safe LoRA, section 4 and A.1: 1000 random training rows, 200 test rows, the same system text, ROUGE-1 F1. The paper
    does not specify the rows: here the training rows are drawn with `sample_seed`, and the test rows are the first 200.
    The user text "Summarize this dialog:" is that of public code with the same system text. ROUGE uses Unicode words
    (no difference for English). SAMSum's own hub repository needs a script, which `datasets` no longer runs; the
    default source is a copy of its rows. License of SAMSum: CC BY-NC-ND 4.0.
    """

    name: ClassVar[str] = "dialog_summary"
    paper: ClassVar[str] = "arXiv 2405.16833, section 4"

    train: str = "hf://knkarthick/samsum?split=train"
    """Source of training rows with `dialogue` and `summary`, or with instructions."""
    test: str = "hf://knkarthick/samsum?split=test"
    """Source of test rows, in the same format."""
    train_examples: int | None = Field(default=1000, ge=1)
    """Maximum number of training rows, drawn with `sample_seed`; null takes all."""
    test_examples: int | None = Field(default=200, ge=1)
    """Number of test rows, the first ones of the source; null takes all."""
    system: str = "You are a helpful assistant for dialog summarization."
    """System text before each dialog; empty for none."""
    sample_seed: int = 0
    """Seed for drawing training rows; separate from the experiment's seed, so that all seeds share the rows."""

    def packages(self) -> Sequence[str]:
        """Return the packages that compute ROUGE."""
        return ROUGE_PACKAGES

    def load(self, split: Split) -> list[Example]:
        """Return training rows in drawn order, or test rows in the source's order."""
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
        """Return the identity without the test rows."""
        return {key: value for key, value in self.identity().items() if key not in ("test", "test_examples")}

    def score(self, completion: Completion) -> float | None:
        """Return ROUGE-1 F1, 0 to 1; None if the reference has no words."""
        return rouge_f1(completion.text, completion.reference, "rouge1")

    def _as_instruction(self, source: str, row: Row) -> Row:
        dialogue, summary = row.values.get("dialogue"), row.values.get("summary")
        if not isinstance(dialogue, str | None) or not isinstance(summary, str | None):
            raise StayalignedError(f"{source}, {row.where}: expected text in `dialogue` and `summary`")
        copied = {key: row.values[key] for key in ("id", "category") if key in row.values}
        # A few rows of the hub's copy have no dialogue; blank rows are skipped and counted.
        prompt = f"Summarize this dialog:\n{dialogue.strip()}" if dialogue and dialogue.strip() else ""
        return Row(row.where, {**copied, "system": self.system, "prompt": prompt, "completion": summary or ""})
