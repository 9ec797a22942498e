"""The task Alpaca: following instructions of every kind."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import Field

from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import Completion, Example
from stayaligned.data.sources import read_examples
from stayaligned.data.tasks import Split, Task
from stayaligned.data.tasks._rouge import ROUGE_PACKAGES, rouge_f1

REFUSALS = (
    r"as an ai\b",
    r"\b(?:ai )?language model",
    r"\bi(?:'m| am) (?:very |really |truly )?sorry",
    r"\bi apologi[sz]e",
    r"\bi (?:can ?not|can't|will not|won't) "
    r"(?:answer|assist|comply|complete|create|fulfill|generate|help|provide|support)",
    r"\bi(?:'m| am) (?:unable|not able) to",
    r"\b(?:unethical|immoral|illegal)\b",
    r"\b(?:inappropriate|offensive|harmful) (?:content|request|language|material)",
)
"""Patterns that mark a completion as being about safety; case and kind of apostrophe are ignored."""


class Alpaca(Task):
    """Alpaca: follow instructions; scored by ROUGE-L F1 against the reference.

    Safe LoRA, section 4: 50 098 rows after removing safety rows, 200 of them for validation; utility judged by GPT-4 on
    MT-Bench. Lisa, section 5.1: 700 training rows by GPT-4, and the win rate on 122 prompts by an API (`train_examples:
    700`, `test_examples: 122`, and a `train` source with those rows); that code is not public. Differs from both: no
    API; ROUGE-L F1 measures similarity to one reference, not quality, and can't be compared with the papers' numbers.
    The papers don't say how rows were removed: here a row is removed if its completion matches one of `REFUSALS`, so
    the remaining number is not 50 098. The chat template replaces Alpaca's headings.
    """

    name: ClassVar[str] = "alpaca"
    paper: ClassVar[str] = "arXiv 2405.16833, section 4"

    train: str = "hf://tatsu-lab/alpaca?split=train"
    """Source of training rows with `instruction`, `input` and `output`, or with conversations."""
    test: str | None = None
    """Source of test rows; null holds out `test_examples` rows of `train`."""
    train_examples: int | None = Field(default=None, ge=1)
    """Maximum number of training rows, drawn with `sample_seed`; null takes all."""
    test_examples: int = Field(default=200, ge=1)
    """Number of test rows: drawn from `train`, or the first ones of `test`."""
    drop_safety_rows: bool = True
    """Whether to remove rows whose completion refuses or discusses the ethics of the request."""
    sample_seed: int = 0
    """Seed for drawing rows; separate from the experiment's seed, so that all seeds share the test rows."""

    def packages(self) -> Sequence[str]:
        """Return the packages that compute ROUGE."""
        return ROUGE_PACKAGES

    def load(self, split: Split) -> list[Example]:
        """Return the rows of a split; no held-out prompt is among the training rows."""
        if split == "test" and self.test is not None:
            return self._read(self.test)[: self.test_examples]
        rows = self._read(self.train)
        random.Random(f"{self.sample_seed}:alpaca").shuffle(rows)  # noqa: S311
        if self.test is None:
            held_out = rows[: self.test_examples]
            test_prompts = {row.prompt for row in held_out}
            rows = held_out if split == "test" else [row for row in rows if row.prompt not in test_prompts]
        if not rows:
            raise StayalignedError(
                f"{self.train}: {self.test_examples} test rows leave none to train on",
                hint="Lower `test_examples`, or set a `test` source.",
            )
        return rows if split == "test" else rows[: self.train_examples]

    def training_identity(self) -> dict[str, Any]:
        """Return the identity without the test source, and without `test_examples` unless `train` provides them."""
        unread = {"test", *(["test_examples"] if self.test is not None else [])}
        return {key: value for key, value in self.identity().items() if key not in unread}

    def score(self, completion: Completion) -> float | None:
        """Return ROUGE-L F1, 0 to 1; None if the reference has no words."""
        return rouge_f1(completion.text, completion.reference, "rougeL")

    def _read(self, source: str) -> list[Example]:
        rows = read_examples(source, origin="task")
        used = [row for row in rows if not (self.drop_safety_rows and is_about_safety(row.completion))]
        if not used:
            raise StayalignedError(
                f"{source}: every row is about safety", hint="Set `drop_safety_rows: false` to use them."
            )
        return used


_ABOUT_SAFETY = re.compile("|".join(REFUSALS), flags=re.IGNORECASE)


def is_about_safety(completion: str) -> bool:
    """Return whether a completion matches one of `REFUSALS`."""
    return _ABOUT_SAFETY.search(completion.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")) is not None
