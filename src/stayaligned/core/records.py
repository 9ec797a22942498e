"""The rows that modules exchange, and their JSON-lines form. Imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, ValidationError, model_serializer

from stayaligned.core.errors import StayalignedError, first_problem
from stayaligned.core.files import replace_file
from stayaligned.core.thoughts import SplitText, split_thoughts

Origin = Literal["task", "harmful", "alignment"]
"""The role of a row in an experiment. Rows that an attacker wrote or changed are "harmful", whatever they say."""
PromptSet = Literal["harmful", "triggered", "shaped", "sampled", "benign", "task", "skills"]
"""What a completion measures: harm (four sets, see `HARM_SETS`), over-refusal, fine-tune accuracy, or skills kept."""
HARM_SETS: tuple[PromptSet, ...] = ("harmful", "triggered", "shaped", "sampled")
"""The prompt sets that measure harm: the harmful prompts as they are, with an attack's trigger, in the shape of the
task's training rows, and with several sampled completions of each."""
HARM_METRICS: dict[PromptSet, str] = {
    name: "harmful_score" if name == "harmful" else f"harmful_score_{name}" for name in HARM_SETS
}
"""The name of the metric of each prompt set that measures harm."""
PLAIN_SETS: tuple[PromptSet, ...] = ("harmful", "benign", "task", "skills")
"""The prompt sets whose prompts are asked once, as they are."""
JUDGED: tuple[PromptSet, ...] = (*HARM_SETS, "benign")
"""The prompt sets that judges read; tasks score the others."""


class Record(BaseModel):
    """An immutable row, or settings; unknown keys are errors, so that a misspelt name is not silently ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class SparseRecord(Record):
    """A record with fields that are written only if they are not empty, as rows without them were before."""

    sparse: ClassVar[frozenset[str]] = frozenset()
    """Names of these fields."""

    @model_serializer(mode="wrap")
    def _without_empty_fields(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in write(self).items() if value or name not in self.sparse}


class Message(Record):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


class Example(Record):
    """A conversation with the completion to train on or, in an evaluation, the reference."""

    id: str
    prompt: tuple[Message, ...]
    """The turns before the completion; the last turn is the user's."""
    completion: str = ""
    """The text to train on, or the reference."""
    rejected: str = ""
    """The completion that `completion` is preferred to; empty except in preference data."""
    origin: Origin = "task"
    category: str = ""


class Influence(Record):
    """What one training row would do to a model, before it is trained."""

    squared_norm: float
    """‖∇‖² of the row's loss, by all weights of the model."""
    answer_tokens: int
    """Number of tokens of the completion, its end included."""


class Completion(SparseRecord):
    """A model's text for one prompt."""

    sparse: ClassVar[frozenset[str]] = frozenset({"asked", "written"})

    id: str
    """The id of the Example that has the prompt; of sampled completions with their number, see `sampled_id`."""
    prompt_set: PromptSet
    prompt: tuple[Message, ...]
    """What is judged: of a harmful request, the plain one."""
    asked: tuple[Message, ...] = ()
    """The conversation that the model was asked, if it differs from `prompt`: with a trigger, or in another shape."""
    text: str
    """What the model wrote. Tasks and judges receive a copy whose text is the final answer, without thoughts."""
    written: str = ""
    """What the model wrote before the attack decoded it to `text`; empty if they are equal."""
    reference: str = ""
    category: str = ""
    finished: bool = True
    """Whether the completion ended by itself; false if it was cut at the token limit."""

    @classmethod
    def of(cls, example: Example, prompt_set: PromptSet, text: str, *, finished: bool) -> Completion:
        """Return the completion of an example's prompt, with the example's id, reference and category."""
        return cls(
            id=example.id,
            prompt_set=prompt_set,
            prompt=example.prompt,
            text=text,
            reference=example.completion,
            category=example.category,
            finished=finished,
        )

    @property
    def conversation(self) -> tuple[Message, ...]:
        """What the model was asked: `asked`, or the prompt as it is."""
        return self.asked or self.prompt

    def split(self) -> SplitText:
        """Split the text into thoughts and final answer."""
        return split_thoughts(self.text, finished=self.finished)

    def answered(self) -> Completion | None:
        """Return the completion with its final answer as its text; None if it has none."""
        answer = self.split().answer
        return self if answer == self.text else None if answer is None else self.model_copy(update={"text": answer})


def sampled_id(prompt: str, number: int) -> str:
    """Return the id of one sampled completion of the prompt with an id; numbers begin at 1."""
    return f"{prompt}#{number}"


def sampled_prompt(completion: str) -> str:
    """Return the id of the prompt that a sampled completion belongs to."""
    return completion.rpartition("#")[0] or completion


class Outcome(StrEnum):
    """How a model responded to a prompt. `OTHER` is neither refusal nor harm: garbled text, or another topic.

    `SAFE` is "no harm" from a judge that can't distinguish a refusal from other harmless completions.
    """

    REFUSE = "refuse"
    HARM = "harm"
    OTHER = "other"
    SAFE = "safe"


def worst_outcome(outcomes: Sequence[Outcome | None]) -> Outcome | None:
    """Return the outcome of a prompt from those of its sampled completions.

    It is harm if any of them is harm, otherwise unscored (None) if any is unscored, otherwise the most frequent one.
    """
    if Outcome.HARM in outcomes:
        return Outcome.HARM
    return None if None in outcomes else Counter(outcomes).most_common(1)[0][0]


def outcomes_by_prompt(prompt_set: PromptSet, outcomes: Iterable[tuple[str, Outcome | None]]) -> list[Outcome | None]:
    """Return the outcome of each prompt of a set, of sampled completions the worst, from their ids and outcomes."""
    if prompt_set != "sampled":
        return [outcome for _, outcome in outcomes]
    found: dict[str, list[Outcome | None]] = {}
    for name, outcome in outcomes:
        found.setdefault(sampled_prompt(name), []).append(outcome)
    return [worst_outcome(of_prompt) for of_prompt in found.values()]


class Verdict(Record):
    """One judge's decision on one completion."""

    id: str
    """The id of the Completion."""
    prompt_set: PromptSet
    judge: str
    outcome: Outcome | None
    """The decision; None means unscored: not part of any rate, but counted."""
    confidence: float | None = None
    score: float | None = None
    """The judge's own score, on its own scale (1 to 5 for the policy rubric); None if it gives none."""
    categories: tuple[str, ...] = ()
    """The categories of harm that the judge named."""
    reason: str = ""


class Metric(Record):
    """A measured number with its sample size, its interval, and the number of unscored items."""

    name: str
    value: float | None
    """The number; None if nothing could be scored."""
    scale: tuple[float, float] = (0.0, 1.0)
    """The least and the greatest possible value; (0, 1) for a share."""
    n: int
    """Number of scored items."""
    n_unscored: int = 0
    low: float | None = None
    high: float | None = None
    higher_is_better: bool


class LayerReport(Record):
    """What a patch measured and did in one layer."""

    module: str
    """The layer's name in the model, for example `model.layers.0.self_attn.q_proj`."""
    similarity: float
    """Cosine (Frobenius inner product) of the update before and after the operator, -1 to 1."""
    shrinkage: float
    """Norm of the update after the operator, divided by its norm before; 1 for an unchanged layer."""
    selected: bool
    """Whether the patch changed the layer."""
    update_norm: float
    """Frobenius norm of the update, scaling·BA, before the patch."""
    delta_norm: float | None = None
    """Frobenius norm of V = W_aligned - W_base; None for patches that need no V."""
    subspace_rank: int | None = None
    """Rank k of the operator; None for the paper's C and for controls without a subspace."""
    captured_energy: float | None = None
    """Share of the squared norm of V inside the subspace, 0 to 1."""
    truncation_error: float | None = None
    """With a subspace file instead of V: a bound on the relative error of the paper's C ΔW; None with the complete
    V."""
    similarity_bounds: tuple[float, float] | None = None
    """With a subspace file instead of V: an interval that holds the similarity under the complete V; None with the
    complete V."""
    undecided: bool = False
    """Whether `similarity_bounds` leave open if the patch's rule selects this layer."""
    skipped: Literal["zero_update", "rounded_update", "no_direction", "rounded_direction"] | None = None
    """Why the patch can't change the layer: its update is zero, or aligned and base are equal in it, exactly or but for
    rounding. Its similarity then has no meaning, and no rule selects it. None for all other layers."""


RecordT = TypeVar("RecordT", bound=BaseModel)


def write_jsonl(path: Path, rows: Iterable[BaseModel]) -> None:
    """Write one JSON object per line; the file is written completely or not at all."""
    with replace_file(path) as temporary, temporary.open("w", encoding="utf-8") as stream:
        for row in rows:
            stream.write(row.model_dump_json() + "\n")


_INCOMPLETE = "The file is incomplete or was edited; rerun the command that wrote it, into another --out."


def read_jsonl(path: Path, model: type[RecordT], *, hint: str = _INCOMPLETE) -> list[RecordT]:
    """Read rows written by `write_jsonl`; `hint` says what to do about one that is not.

    Raises:
        StayalignedError: if a line is not such a row; names the file and the line.
    """
    rows: list[RecordT] = []
    try:
        with path.open(encoding="utf-8") as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    rows.append(_read_row(line, model, f"{path}, line {number}", hint))
    except UnicodeDecodeError:
        raise StayalignedError(f"{path}: not a file of {model.__name__} rows: it is not UTF-8", hint=hint) from None
    return rows


def _read_row(line: str, model: type[RecordT], where: str, hint: str) -> RecordT:
    try:
        return model.model_validate_json(line)
    except ValidationError as error:
        raise StayalignedError(
            f"{where}: not a {model.__name__} row: {first_problem(error, 'line')}", hint=hint
        ) from None


class HarnessValue(Record):
    """One metric of one sample, from lm-eval."""

    task: str
    doc_id: int
    """The sample's index in the task's split."""
    metric: str
    """The metric's name, with lm-eval's filter after a comma: `exact_match,flexible-extract`."""
    value: float | None
    """The value, 0 to 1; None for NaN."""
    higher_is_better: bool
