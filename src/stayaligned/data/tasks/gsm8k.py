"""The task GSM8K: grade-school arithmetic in words."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import Completion, Example
from stayaligned.data.sources import Row, build_examples, read_rows
from stayaligned.data.tasks import Split, Task
from stayaligned.data.tasks._scoring import FINAL_ANSWER, number_match


class GSM8K(Task):
    """GSM8K: solve word problems step by step, ending in a number.

    Lisa, section 5.1 and its code: the question alone as the prompt, the worked answer with "####" replaced by "The
    final answer is:", and the first 1000 test rows. The number after that phrase is compared, or the last number if
    there is none. The paper cuts completions after 200 tokens: set `generation.max_new_tokens: 200`.
    """

    name: ClassVar[str] = "gsm8k"
    paper: ClassVar[str] = "arXiv 2405.18641, section 5.1"

    train: str = "hf://openai/gsm8k?config=main&split=train"
    """Source of training rows with `question` and `answer`, or with instructions."""
    test: str = "hf://openai/gsm8k?config=main&split=test"
    """Source of test rows, in the same format."""
    test_examples: int | None = Field(default=1000, ge=1)
    """Number of test rows, the first ones of the source; null takes all."""

    def load(self, split: Split) -> list[Example]:
        """Return the rows in the source's order."""
        source = self.train if split == "train" else self.test
        rows = read_rows(source)
        if "question" in rows[0].values:
            rows = [_as_instruction(source, row) for row in rows]
        examples = build_examples(source, rows, origin="task")
        return examples if split == "train" else examples[: self.test_examples]

    def training_identity(self) -> dict[str, Any]:
        """Return the identity without the test rows."""
        return {key: value for key, value in self.identity().items() if key not in ("test", "test_examples")}

    def score(self, completion: Completion) -> float | None:
        """Return 1 if the final number equals the reference's, else 0; None if the reference has no number."""
        return number_match(completion.text, completion.reference)


def _as_instruction(source: str, row: Row) -> Row:
    question, answer = row.values.get("question"), row.values.get("answer")
    if not isinstance(question, str) or not isinstance(answer, str):
        raise StayalignedError(f"{source}, {row.where}: expected text in `question` and `answer`")
    copied = {key: row.values[key] for key in ("id", "category") if key in row.values}
    return Row(row.where, {**copied, "prompt": question, "completion": answer.replace("####", FINAL_ANSWER)})
