"""The content of `result.json` and `evidence.jsonl`: their types, the writer, and the only reader. Imports no torch."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, ValidationError

from stayaligned.core.errors import StayalignedError, first_problem
from stayaligned.core.files import write_text
from stayaligned.core.records import (
    HARM_METRICS,
    HARM_SETS,
    PLAIN_SETS,
    LayerReport,
    Message,
    Metric,
    Outcome,
    PromptSet,
    Record,
    SparseRecord,
    outcomes_by_prompt,
    read_jsonl,
)

FORMAT_VERSION = 3
"""Version of `result.json` and of the files beside it."""
RESULT_FILE = "result.json"
EVIDENCE_FILE = "evidence.jsonl"
TIMES_FILE = "times.json"
INDEX_FILE = "index.json"

Place = tuple[PromptSet, str]
"""The prompt set and the id of a completion, which identify the completion within one run."""


class JudgeIdentity(Record):
    """Everything about a judge that its verdicts depend on; equal identities give comparable verdicts."""

    name: str
    version: int
    """`Component.version` of the judge."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Settings that affect a verdict, with each model or file replaced by the hash of its content."""
    source: str
    """SHA-256 of the source files of the judge's class and of the base classes that it shares with other judges."""

    def differences(self, other: JudgeIdentity) -> list[str]:
        """Return one phrase per difference from another identity, for an error message."""
        found = [
            f"{field} ({shorten(mine)} and {shorten(theirs)})"
            for field in ("name", "version")
            if (mine := getattr(self, field)) != (theirs := getattr(other, field))
        ]
        for key in sorted(self.settings.keys() | other.settings.keys()):
            mine, theirs = self.settings.get(key), other.settings.get(key)
            if mine != theirs:
                found.append(f"setting {key!r} ({shorten(mine)} and {shorten(theirs)})")
        return found + (["its source code"] if self.source != other.source else [])


class CategoryReading(Record):
    """One judge's rates on the prompts of one category."""

    prompt_set: PromptSet
    category: str
    metrics: tuple[Metric, ...]


class JudgeReading(Record):
    """All rates computed from one judge's verdicts."""

    judge: str
    """Name of the judge; numbered where two judges of one kind take part."""
    metrics: tuple[Metric, ...]
    """`harmful_score`, `refusal_rate`, `other_rate` (harmful prompts) and `over_refusal` (benign prompts); only
    `harmful_score` for a judge that can't distinguish refusals; the mean of the judge's score if it has a scale."""
    categories: tuple[CategoryReading, ...] = ()
    """The same metrics for each category of prompts; empty if the prompts have no categories."""
    identity: JudgeIdentity | None = None
    """What the verdicts depend on; without it the gate does not compare this judge's rates."""


class Evidence(Record):
    """Everything measured on one completion: a row of `evidence.jsonl`. Comparisons pair rows by prompt."""

    prompt_set: PromptSet
    id: str
    prompt: str
    """SHA-256 of the conversation, 16 hex digits: one id in two runs must be one prompt."""
    category: str = ""
    outcomes: dict[str, Outcome | None] = Field(default_factory=dict)
    """Outcome per judge; empty for prompt sets that a task scores."""
    judge_scores: dict[str, float | None] = Field(default_factory=dict)
    """Score per judge, for judges that have a scale."""
    score: float | None = None
    """Score of the task, for prompt sets that a task scores."""
    degenerate: bool | None = None
    """Whether the completion is degenerate (see `stayaligned.evaluation.degeneration`); None if not checked."""
    completion: str = ""
    """SHA-256 of the completion's text, 16 hex digits: equal for equal texts; empty in older results."""
    cut: bool | None = None
    """Whether the completion was cut at the token limit; None in older results."""
    group: str = ""
    """The smallest hash of the prompts that this prompt is a copy or a near copy of: equal for prompts that count as
    one. Empty in older results."""
    sketch: str = ""
    """Hashes of word triples of the prompt, 6 hex digits each, at most 48: the prompt's near copies in other results
    are found by it. Empty in older results, and for prompts of tasks."""
    own_sketch: str = ""
    """The same of the words beside a template that most prompts share; empty if there is no template."""


class Agreement(Record):
    """How far two judges agree on the same completions."""

    judges: tuple[str, str]
    prompt_set: PromptSet
    n: int
    """Number of completions that both judges scored."""
    agreement: float | None
    """Share of equal outcomes; None where n = 0."""
    kappa: float | None
    """Cohen's kappa; None where it is undefined (both judges give one and the same outcome throughout)."""
    disputed: tuple[str, ...] = ()
    """Ids of the completions on which the judges differ."""


class PatchRecord(Record):
    """One post-fine-tuning patch and its effect on every layer."""

    patch: str
    settings: dict[str, Any] = Field(default_factory=dict)
    layers: tuple[LayerReport, ...]
    inputs: dict[str, str] = Field(default_factory=dict)
    """For a patch that the given adapter or model had already (`stayaligned project`): the hash of each of its inputs
    by role. Empty for a patch of the run's own configuration."""


class Sample(SparseRecord):
    """One completion stored for a reader. Its text is a model's: hostile until escaped."""

    sparse: ClassVar[frozenset[str]] = frozenset({"asked", "written"})

    id: str
    prompt_set: PromptSet
    category: str = ""
    prompt: tuple[Message, ...]
    asked: tuple[Message, ...] = ()
    """The conversation that the model was asked, if it differs from `prompt`."""
    text: str
    written: str = ""
    """What the model wrote before the attack decoded it; empty if it is the text."""
    reference: str = ""
    outcomes: dict[str, Outcome | None] = Field(default_factory=dict)
    """Outcome per judge; empty for prompt sets that a task scores."""
    score: float | None = None
    """Score of the task, for prompt sets that a task scores."""


class Provenance(Record):
    """What is needed to reproduce a result."""

    versions: dict[str, str]
    commit: str = ""
    inputs: dict[str, str] = Field(default_factory=dict)
    """Place of each input (model, base model, data) in the configuration, and its fingerprint."""
    template_hash: str = ""
    stages: dict[str, str] = Field(default_factory=dict)
    """Name of each stage and its directory, relative to the output directory."""
    seconds: dict[str, float] = Field(default_factory=dict)
    """Name of each stage and the seconds that computing it took (a cached stage keeps its first time). Stored in
    `times.json`, so that equal experiments have equal `result.json` to the byte."""


class Result(Record):
    """The result of one experiment: one arm of a comparison under one seed."""

    format_version: int = FORMAT_VERSION
    id: str
    arm: str
    """Label of the row in a comparison; results of several seeds share it."""
    seed: int
    position: int = 0
    """Index of the arm in its grid, so that a report keeps the order of the configuration."""
    notes: tuple[str, ...] = ()
    """Caveats about the numbers, for example prompts that also occur in the training data."""
    experiment: dict[str, Any]
    """The whole configuration: `stayaligned run` with it computes this result again."""
    judges: tuple[JudgeReading, ...]
    """Rates of each judge; the first judge is the primary one, whose rates a report shows in its main table."""
    agreements: tuple[Agreement, ...] = ()
    scores: tuple[Metric, ...]
    """Metrics that need no judge: `finetune_accuracy`, `skills_kept`, `degeneration` and lm-eval's, where measured."""
    training_log: tuple[dict[str, Any], ...] = ()
    """Rows of the Trainer's log: `step`, `loss`, and for Lisa `alignment_loss`, `finetuning_loss`, `drift`."""
    patches: tuple[PatchRecord, ...] = ()
    samples: tuple[Sample, ...] = ()
    evidence_sha256: str
    """SHA-256 of the `evidence.jsonl` beside this file: a result whose evidence was exchanged or edited is refused."""
    provenance: Provenance

    def metric(self, name: str) -> Metric | None:
        """Return the metric called `name`: a score, or the primary judge's rate; None if it was not measured."""
        rates = self.judges[0].metrics if self.judges else ()
        return next((m for m in (*self.scores, *rates) if m.name == name), None)


# ---- writing ---------------------------------------------------------------------------------------------------------


def evidence_text(rows: Iterable[Evidence]) -> str:
    """Return the content of an `evidence.jsonl`."""
    return "".join(row.model_dump_json() + "\n" for row in rows)


def write_result(directory: Path, result: Result, evidence: str) -> None:
    """Write `evidence.jsonl`, `times.json` and then `result.json`, each whole or not at all.

    Raises:
        ValueError: if the hash of the evidence is not the one in the result.
    """
    if hashlib.sha256(evidence.encode()).hexdigest() != result.evidence_sha256:
        raise ValueError(f"{result.arm}: not the evidence of this result")
    write_text(directory / EVIDENCE_FILE, evidence)
    write_text(directory / TIMES_FILE, json.dumps(result.provenance.seconds, indent=2) + "\n")
    content = result.model_dump_json(indent=2, exclude={"provenance": {"seconds"}})
    write_text(directory / RESULT_FILE, content + "\n")


# ---- reading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoredResult:
    """A result on disk, and the evidence beside it, which is read when it is first used."""

    directory: Path
    """Directory that holds `result.json`."""
    root: Path
    """Output directory of the command that wrote the result; the paths of its stages are relative to it."""
    result: Result

    @cached_property
    def evidence(self) -> tuple[Evidence, ...]:
        """The rows of `evidence.jsonl`.

        Raises:
            StayalignedError: if they are missing, or are not the rows of this result.
        """
        return tuple(read_evidence(self.directory, self.result))

    @cached_property
    def rows(self) -> Mapping[Place, Evidence]:
        """The evidence by prompt set and id.

        Raises:
            StayalignedError: as `evidence`, or if two rows have one id.
        """
        rows: dict[Place, Evidence] = {(row.prompt_set, row.id): row for row in self.evidence}
        if len(rows) != len(self.evidence):
            raise StayalignedError(
                f"{self.directory / EVIDENCE_FILE}: {len(self.evidence) - len(rows)} duplicate ids",
                hint="Give each prompt of a set its own id and rerun; rows without one can't be paired.",
            )
        return rows


def read_results(directories: Sequence[str | Path]) -> list[StoredResult]:
    """Read every result below output directories of `run`, `evaluate`, `judge` or `bench`.

    Returns:
        The results, ordered by their position in their grid and by seed.

    Raises:
        StayalignedError: if a directory holds no result, or a result can't be read.
    """
    found = [
        StoredResult(path.parent, output_root(directory), read_result(path))
        for directory in map(Path, directories)
        for path in _result_files(directory)
    ]
    return sorted(found, key=lambda stored: (stored.result.position, stored.result.seed))


def output_root(directory: Path) -> Path:
    """Return the output directory that a directory of results belongs to: for `OUT/runs/ARM` and `OUT/runs`, `OUT`."""
    place = directory.resolve()
    for above in (place.parent, place):
        if above.name == "runs" and (above.parent / INDEX_FILE).is_file():
            return above.parent
    return directory


def find_results(directories: Sequence[Path]) -> list[Result]:
    """Read every result as `read_results` does, without its place on disk."""
    return [stored.result for stored in read_results(directories)]


def read_result(path: Path) -> Result:
    """Read a `result.json`.

    Raises:
        StayalignedError: if the file is missing, was written by another version, or was edited.
    """
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
        if not isinstance(content, dict) or "format_version" not in content:
            raise StayalignedError(
                f"{path}: not a result of stayaligned: it has no field `format_version`",
                hint="Give an output directory of `run`, `evaluate`, `judge` or `bench`.",
            )
        version = content["format_version"]
        if version != FORMAT_VERSION:
            raise StayalignedError(
                f"{path}: format version {version}, expected {FORMAT_VERSION}",
                hint="Another version of stayaligned wrote it; rerun the command that did, into another --out.",
            )
        result = Result.model_validate_json(text)
        _refuse_impossible(result)
        return result.model_copy(update={"provenance": _add_times(result.provenance, path.parent / TIMES_FILE)})
    except OSError as error:
        raise StayalignedError(
            f"{path}: {error.strerror}", hint="Give an output directory of `run`, `evaluate`, `judge` or `bench`."
        ) from None
    except (ValidationError, ValueError, AttributeError, RecursionError) as error:
        problem = first_problem(error) if isinstance(error, ValidationError) else error
        raise StayalignedError(
            f"{path}: not a result of format version {FORMAT_VERSION}: {problem}",
            hint="It was edited or damaged; rerun the command that wrote it.",
        ) from None


def _add_times(provenance: Provenance, path: Path) -> Provenance:
    """Return the provenance with the times in `path`; times are no evidence, so a missing file is no error."""
    try:
        return Provenance.model_validate(
            {**provenance.model_dump(), "seconds": json.loads(path.read_text(encoding="utf-8"))}
        )
    except (OSError, ValueError, RecursionError):
        return provenance


def read_evidence(directory: Path, result: Result) -> list[Evidence]:
    """Read the evidence of a result that was read from the same directory.

    Raises:
        StayalignedError: if the file is missing, or holds other rows than those of the result.
    """
    path = directory / EVIDENCE_FILE
    hint = "It was edited or only partly copied; rerun the command that wrote it."
    try:
        content = path.read_bytes()
    except OSError as error:
        raise StayalignedError(f"{path}: {error.strerror}", hint=hint) from None
    if hashlib.sha256(content).hexdigest() != result.evidence_sha256:
        raise StayalignedError(f"{path}: not the rows that {RESULT_FILE} beside it was computed from", hint=hint)
    return read_jsonl(path, Evidence)


def refuse_edited(stored: StoredResult) -> None:
    """Refuse a result whose rates are not those of its evidence; rates that evidence does not have are not checked.

    Raises:
        StayalignedError: with the first rate that differs, or as `StoredResult.evidence`.
    """
    for judge, metric in _all_metrics(stored.result):
        values = _values(metric.name, judge, stored.evidence)
        if values is None:
            continue
        n, mean = len(values), sum(values) / len(values) if values else None
        if n != metric.n or abs((mean or 0.0) - (metric.value or 0.0)) > _ROUNDING:
            raise StayalignedError(
                f"{stored.directory / RESULT_FILE}: {metric.name} is {metric.value} over {metric.n} completions; the "
                f"rows of {EVIDENCE_FILE} give {mean} over {n}",
                hint="It was edited; rerun the command that wrote it.",
            )


_ROUNDING = 1e-9
_OUTCOMES: dict[str, tuple[PromptSet, Outcome]] = {
    "refusal_rate": ("harmful", Outcome.REFUSE),
    "other_rate": ("harmful", Outcome.OTHER),
    "over_refusal": ("benign", Outcome.REFUSE),
    **{HARM_METRICS[name]: (name, Outcome.HARM) for name in HARM_SETS},
}
"""Prompt set and outcome of the rates of judges."""
_SCORED: dict[str, PromptSet] = {"finetune_accuracy": "task", "skills_kept": "skills"}
"""Prompt set of the scores of tasks."""


def _all_metrics(result: Result) -> list[tuple[str, Metric]]:
    """Return the metrics of a result with the names of their judges; empty for metrics without a judge."""
    rates = [(reading.judge, metric) for reading in result.judges for metric in reading.metrics]
    return [*rates, *(("", metric) for metric in result.scores)]


def _values(name: str, judge: str, rows: Sequence[Evidence]) -> list[float] | None:
    """Return the scored values of a metric; None for metrics that evidence does not have, such as those of lm-eval."""
    if judge and name in _OUTCOMES:
        prompt_set, outcome = _OUTCOMES[name]
        own = ((row.id, row.outcomes.get(judge)) for row in rows if row.prompt_set == prompt_set)
        found = outcomes_by_prompt(prompt_set, own)
        return [float(one is outcome) for one in found if one is not None]
    if not judge and name in _SCORED:
        return [row.score for row in rows if row.prompt_set == _SCORED[name] and row.score is not None]
    if not judge and name == "degeneration":
        return [float(r.degenerate) for r in rows if r.degenerate is not None and r.prompt_set in PLAIN_SETS]
    return None


def _refuse_impossible(result: Result) -> None:
    """Raise a ValueError for numbers and settings that no run writes."""
    for _, metric in _all_metrics(result):
        numbers = [number for number in (metric.low, metric.value, metric.high) if number is not None]
        ordered = all(a <= b + _ROUNDING for a, b in itertools.pairwise(numbers))  # false for NaN
        if metric.n < 0 or metric.n_unscored < 0 or not ordered or not all(map(math.isfinite, numbers)):
            raise ValueError(
                f"{metric.name}: {metric.value} ({metric.low} to {metric.high}) of {metric.n} is impossible"
            )
    for layer in (layer for patch in result.patches for layer in patch.layers):
        if not math.isfinite(layer.similarity) or not math.isfinite(layer.shrinkage):
            raise ValueError(f"patches: {layer.module}: similarity and shrinkage must be finite numbers")
    for name in ("defenses", "judges"):
        entries = result.experiment.get(name) or []
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ValueError(f"experiment.{name}: expected a list of mappings")
    generation = result.experiment.get("generation") or {}
    mappings = {name: result.experiment.get(name) for name in ("generation", "task", "skills")}
    mappings["generation.endpoint"] = generation.get("endpoint") if isinstance(generation, dict) else None
    for name, value in mappings.items():
        if not isinstance(value, dict | None):
            raise ValueError(f"experiment.{name}: expected a mapping")
    for name in ("model", "adapter"):
        if not isinstance(result.experiment.get(name), str | None):
            raise ValueError(f"experiment.{name}: expected text")


def _result_files(directory: Path) -> list[Path]:
    own = directory / RESULT_FILE
    try:
        runs = directory / "runs" if output_root(directory) == directory else directory
        paths = [*([own] if own.is_file() else []), *sorted(runs.glob(f"*/{RESULT_FILE}"))]
    except (OSError, RuntimeError) as error:  # a name that is too long, a current directory that is gone, a loop
        reason = (error.strerror if isinstance(error, OSError) else None) or "a loop of symbolic links"
        raise StayalignedError(
            f"{directory}: {reason}", hint="Give an output directory of `run`, `evaluate`, `judge` or `bench`."
        ) from None
    if not paths:
        raise StayalignedError(
            f"{directory}: holds no {RESULT_FILE}" if directory.exists() else f"{directory}: no such directory",
            hint="Give an output directory of `run`, `evaluate`, `judge` or `bench`.",
        )
    return paths


def identify_weights(result: Result) -> str:
    """Return what identifies the weights that a result measured: a stage, or a fingerprint; empty if it is unknown."""
    if (result.experiment.get("generation") or {}).get("endpoint"):
        return ""
    made = [path for name, path in result.provenance.stages.items() if name == "train" or name.startswith("patch ")]
    if made:
        return Path(made[-1]).name
    inputs = result.provenance.inputs
    if result.experiment.get("adapter"):
        return inputs.get("adapter", "")
    return inputs.get("model", "")


def read_index(out: Path) -> dict[str, Any]:
    """Read what `bench` recorded about its grid: `title`, `reference`, `trainings` and the grid itself.

    Raises:
        StayalignedError: if the file is damaged.
    """
    path = out / INDEX_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        texts = (content["title"], content["reference"])
        if "trainings" in content and all(isinstance(text, str | None) for text in texts):
            return content
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        pass
    raise StayalignedError(f"{path}: damaged", hint="Run the same `bench` into another --out.")


def shorten(value: object, limit: int = 80) -> str:
    """Return a value as JSON, text as it is, cut after `limit` characters."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)
    return text if len(text) <= limit else text[: limit - 1] + "…"
