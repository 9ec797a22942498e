"""What one experiment found: the content of `result.json`, and the only input of a report. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from stayaligned.core.errors import StayalignedError
from stayaligned.core.files import write_text
from stayaligned.core.records import LayerReport, Message, Metric, Outcome, PromptSet, Record, read_jsonl

FORMAT_VERSION = 2
RESULT_FILE = "result.json"
EVIDENCE_FILE = "evidence.jsonl"
TIMES_FILE = "times.json"


class CategoryReading(Record):
    """One judge's rates on the prompts of one category."""

    prompt_set: PromptSet
    category: str
    metrics: tuple[Metric, ...]


class JudgeReading(Record):
    """All rates that one judge's verdicts give."""

    judge: str
    metrics: tuple[Metric, ...]
    """`harmful_score`, `refusal_rate`, `other_rate` (harmful prompts) and `over_refusal` (benign prompts); the first
    alone of a judge that can't tell a refusal; and the mean of the judge's own number, if it gives one."""
    categories: tuple[CategoryReading, ...] = ()
    """The same for each category of prompts, where the prompts have some."""


class Evidence(Record):
    """What was found of one prompt's answer: a row of `evidence.jsonl`, which comparisons pair by the prompt."""

    prompt_set: PromptSet
    id: str
    prompt: str
    """SHA-256 of the conversation, 16 hex digits: the same id in two runs must be the same prompt."""
    category: str = ""
    outcomes: dict[str, Outcome | None] = Field(default_factory=dict)
    """Per judge; empty for prompt sets that are scored rather than judged."""
    judge_scores: dict[str, float | None] = Field(default_factory=dict)
    """The number of each judge that gives one."""
    score: float | None = None
    """Of prompt sets that a task scores."""
    degenerate: bool | None = None
    """Whether the answer is degenerate (see `stayaligned.evaluation.degeneration`); None if that was not checked."""


class Agreement(Record):
    """How far two judges agree on the same completions."""

    judges: tuple[str, str]
    prompt_set: PromptSet
    n: int
    """Completions that both scored."""
    agreement: float | None
    """Share of equal outcomes; None where n = 0."""
    kappa: float | None
    """Cohen's kappa; None where it is undefined (both judges always say the same single thing)."""
    disputed: tuple[str, ...] = ()
    """Ids of completions on which they differ."""


class PatchRecord(Record):
    """One post-fine-tuning patch and what it did to every layer."""

    patch: str
    settings: dict[str, Any] = Field(default_factory=dict)
    layers: tuple[LayerReport, ...]


class Sample(Record):
    """One answer, kept for a reader's eyes. Its text is a model's: hostile until escaped."""

    id: str
    prompt_set: PromptSet
    category: str = ""
    prompt: tuple[Message, ...]
    text: str
    reference: str = ""
    outcomes: dict[str, Outcome | None] = Field(default_factory=dict)
    """Per judge; empty for prompt sets that are scored rather than judged."""
    score: float | None = None


class Provenance(Record):
    """What it takes to run this again."""

    versions: dict[str, str]
    commit: str = ""
    inputs: dict[str, str] = Field(default_factory=dict)
    """Name of each input (model, base model, data) and its fingerprint."""
    template_hash: str = ""
    stages: dict[str, str] = Field(default_factory=dict)
    """Stage name and its directory, relative to the output directory."""
    seconds: dict[str, float] = Field(default_factory=dict)
    """Stage name and how long it took when it was computed (a cached stage keeps its first time). In a file of its own,
    so that equal experiments have equal results to the byte."""


class Result(Record):
    """One experiment: one arm of a comparison under one seed."""

    format_version: int = FORMAT_VERSION
    id: str
    arm: str
    """The label of the comparison's row; results of several seeds share it."""
    seed: int
    position: int = 0
    """The arm's place in its grid, so that a report keeps the order of the configuration."""
    notes: tuple[str, ...] = ()
    """What a reader must know before trusting the numbers: prompts that also stand in the training data, say."""
    experiment: dict[str, Any]
    """The whole configuration: `stayaligned run` of it computes this result again."""
    judges: tuple[JudgeReading, ...]
    """The first one is the primary judge, whose rates a report shows in its main table."""
    agreements: tuple[Agreement, ...] = ()
    scores: tuple[Metric, ...]
    """`finetune_accuracy` and `skills_kept`, as far as the experiment measures them."""
    training_log: tuple[dict[str, Any], ...] = ()
    """Rows of the Trainer's log: `step`, `loss`, and for Lisa `alignment_loss`, `finetuning_loss`, `drift`."""
    patches: tuple[PatchRecord, ...] = ()
    samples: tuple[Sample, ...] = ()
    evidence_sha256: str
    """Of `evidence.jsonl` beside this: a result whose rows were exchanged or edited is refused."""
    provenance: Provenance

    def metric(self, name: str) -> Metric | None:
        """The metric called `name`: a score, or the primary judge's rate; None if it was not measured."""
        rates = self.judges[0].metrics if self.judges else ()
        return next((m for m in (*self.scores, *rates) if m.name == name), None)


def evidence_text(rows: Iterable[Evidence]) -> str:
    """The content of an `evidence.jsonl`."""
    return "".join(row.model_dump_json() + "\n" for row in rows)


def write_result(directory: Path, result: Result, evidence: str) -> None:
    """Write `evidence.jsonl`, `times.json` and then `result.json`, each whole or not at all.

    Raises:
        ValueError: if the evidence is not the result's.
    """
    if hashlib.sha256(evidence.encode()).hexdigest() != result.evidence_sha256:
        raise ValueError(f"{result.arm}: not the evidence of this result")
    write_text(directory / EVIDENCE_FILE, evidence)
    write_text(directory / TIMES_FILE, json.dumps(result.provenance.seconds, indent=2) + "\n")
    content = result.model_dump_json(indent=2, exclude={"provenance": {"seconds"}})
    write_text(directory / RESULT_FILE, content + "\n")


def read_evidence(directory: Path, result: Result) -> list[Evidence]:
    """The rows behind a result that was read from the same directory.

    Raises:
        StayalignedError: if they are missing, or are not the ones that the result was made of.
    """
    path = directory / EVIDENCE_FILE
    hint = "It was edited by hand or only half copied; rerun the command that made it."
    try:
        content = path.read_bytes()
    except OSError as error:
        raise StayalignedError(f"{path}: {error.strerror}", hint=hint) from None
    if hashlib.sha256(content).hexdigest() != result.evidence_sha256:
        raise StayalignedError(f"{path}: not the rows that {RESULT_FILE} beside it was made of", hint=hint)
    return read_jsonl(path, Evidence)


def read_result(path: Path) -> Result:
    """Read a `result.json`.

    Raises:
        StayalignedError: if the file is missing, from another format version, or edited by hand.
    """
    try:
        result = Result.model_validate_json(path.read_text(encoding="utf-8"))
        if result.format_version != FORMAT_VERSION:
            raise StayalignedError(
                f"{path}: format version {result.format_version}, expected {FORMAT_VERSION}",
                hint="It was written by another version of stayaligned; rerun the command that made it.",
            )
        return result.model_copy(update={"provenance": _with_times(result.provenance, path.parent / TIMES_FILE)})
    except OSError as error:
        raise StayalignedError(
            f"{path}: {error.strerror}", hint="Give a directory that `run` or `bench` wrote."
        ) from None
    except (ValidationError, UnicodeDecodeError) as error:
        detail = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
        where = ".".join(str(part) for part in detail["loc"])
        raise StayalignedError(
            f"{path}: not a result of format version {FORMAT_VERSION}: {where}: {detail['msg']}",
            hint="It was edited by hand or written by another version; rerun the command that made it.",
        ) from None


def _with_times(provenance: Provenance, path: Path) -> Provenance:
    """The provenance with the times that stand beside the result; they are no evidence, so they may be missing."""
    try:
        return Provenance.model_validate(
            {**provenance.model_dump(), "seconds": json.loads(path.read_text(encoding="utf-8"))}
        )
    except (OSError, ValueError):
        return provenance


def find_results(directories: Sequence[Path]) -> list[Result]:
    """Every result in the directories that `run` or `bench` wrote, in the order of the grids that made them.

    Raises:
        StayalignedError: if a directory holds none, or one can't be read.
    """
    found = [read_result(path) for directory in directories for path in result_files(directory)]
    return sorted(found, key=lambda result: (result.position, result.seed))


def result_files(directory: Path) -> list[Path]:
    """The result of a `run`, or those of a `bench`, below the directory that it wrote.

    Raises:
        StayalignedError: if there is none.
    """
    own = directory / RESULT_FILE
    paths = [*([own] if own.is_file() else []), *sorted((directory / "runs").glob(f"*/{RESULT_FILE}"))]
    if not paths:
        raise StayalignedError(
            f"{directory}: holds no {RESULT_FILE}", hint="Give a directory that `run` or `bench` wrote."
        )
    return paths


INDEX_FILE = "index.json"


def read_index(out: Path) -> dict[str, Any]:
    """What `bench` recorded of its grid: `title`, `reference`, `trainings` and the grid itself.

    Raises:
        StayalignedError: if the record is damaged.
    """
    path = out / INDEX_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if {"title", "reference", "trainings"} <= content.keys():
            return content
    except (ValueError, AttributeError):
        pass
    raise StayalignedError(f"{path}: damaged", hint="Run the same `bench` into another --out.")
