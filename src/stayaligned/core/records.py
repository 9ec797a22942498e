"""The rows that cross module borders, and their JSON-lines form. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from stayaligned.core.errors import StayalignedError
from stayaligned.core.files import replace_file

Origin = Literal["task", "harmful", "alignment"]
PromptSet = Literal["harmful", "benign", "task", "skills"]
"""Which question a completion answers: harm, over-refusal, fine-tune accuracy, or skills kept."""


class Record(BaseModel):
    """An immutable row; unknown keys are errors, so that a misspelt column is not silently dropped."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Message(Record):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


class Example(Record):
    """A conversation and the answer that is trained on or, in an evaluation set, the reference answer."""

    id: str
    prompt: tuple[Message, ...]
    """Everything before the answer; the last turn is the user's."""
    completion: str = ""
    rejected: str = ""
    """The answer that `completion` is preferred to, in rows of preferences."""
    origin: Origin = "task"
    category: str = ""


class Completion(Record):
    """What a model answered to one prompt."""

    id: str
    """The id of the Example it answers."""
    prompt_set: PromptSet
    prompt: tuple[Message, ...]
    text: str
    reference: str = ""
    category: str = ""
    finished: bool = True
    """False where the answer was cut at the token limit."""

    @classmethod
    def of(cls, example: Example, prompt_set: PromptSet, text: str, *, finished: bool) -> Completion:
        """The answer to an example, with what is known of it."""
        return cls(
            id=example.id,
            prompt_set=prompt_set,
            prompt=example.prompt,
            text=text,
            reference=example.completion,
            category=example.category,
            finished=finished,
        )


class Outcome(StrEnum):
    """How a model met a request. `OTHER` is neither: garble, or an answer to something else.

    `SAFE` is "no harm" from a judge that can't tell a refusal from anything else that does none.
    """

    REFUSE = "refuse"
    HARM = "harm"
    OTHER = "other"
    SAFE = "safe"


class Verdict(Record):
    """One judge's reading of one completion."""

    id: str
    """The id of the Completion."""
    prompt_set: PromptSet
    judge: str
    outcome: Outcome | None
    """None means *unscored*: it enters no rate, and is counted."""
    confidence: float | None = None
    score: float | None = None
    """The judge's own number, on its own scale (1 to 5 for the policy rubric); None where it gives none."""
    categories: tuple[str, ...] = ()
    """The kinds of harm that the judge named."""
    reason: str = ""


class Metric(Record):
    """A number with what is needed to believe it: sample size, interval, and how much went unscored."""

    name: str
    value: float | None
    """None when nothing could be scored."""
    scale: tuple[float, float] = (0.0, 1.0)
    """The least and the greatest possible value; of (0, 1) it is a share."""
    n: int
    """Scored items behind `value`."""
    n_unscored: int = 0
    low: float | None = None
    high: float | None = None
    higher_is_better: bool


class LayerReport(Record):
    """What a patch found and did in one LoRA layer."""

    module: str
    """The layer's name in the model, `model.layers.0.self_attn.q_proj`."""
    similarity: float
    """Cosine of the update before and after the operator, Frobenius inner product, -1 to 1."""
    shrinkage: float
    """Norm of the update after / before the operator; 1 where the layer was left as it was."""
    selected: bool
    """Whether the layer was changed."""
    update_norm: float
    """Frobenius norm of the update scaling·BA before the patch."""
    delta_norm: float | None = None
    """Frobenius norm of V = W_aligned - W_base; None for patches that need no V."""
    subspace_rank: int | None = None
    """The k of a rank-k operator; None for the paper's C and for the controls without a subspace."""
    captured_energy: float | None = None
    """Share of the squared norm of V inside that subspace, 0 to 1."""
    truncation_error: float | None = None
    """Where a subspace file stands for V: a bound on the relative error of the paper's C ΔW, as far as the stored
    directions are V's own (large weights are sampled: to about 1e-3); None where V was whole."""


RecordT = TypeVar("RecordT", bound=BaseModel)


def write_jsonl(path: Path, rows: Iterable[BaseModel]) -> None:
    """Write one JSON object a line; the file appears whole or not at all."""
    with replace_file(path) as temporary, temporary.open("w", encoding="utf-8") as stream:
        for row in rows:
            stream.write(row.model_dump_json() + "\n")


def read_jsonl(path: Path, model: type[RecordT]) -> list[RecordT]:
    """Read rows written by `write_jsonl`.

    Raises:
        StayalignedError: naming the file and line that is not such a row.
    """
    rows: list[RecordT] = []
    with path.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                rows.append(model.model_validate_json(line))
            except ValidationError as error:
                first = error.errors()[0]
                where = ".".join(str(part) for part in first["loc"])
                raise StayalignedError(
                    f"{path}, line {number}: not a {model.__name__} row: {where or 'line'}: {first['msg']}",
                    hint="The file was cut off or edited by hand; delete it and rerun the command that wrote it.",
                ) from None
    return rows


class HarnessValue(Record):
    """One metric of one sample, as lm-eval gave it."""

    task: str
    doc_id: int
    """The sample's place in the task's split."""
    metric: str
    """With the filter of the answer behind a comma where there is one: `exact_match,flexible-extract`."""
    value: float | None
    """0 to 1; None where it is no number (NaN)."""
    higher_is_better: bool
