"""A report as values: everything that the writers print, worked out once. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from stayaligned.core.records import Message, Metric, Outcome, PromptSet
from stayaligned.evaluation.metrics import PairedDifference
from stayaligned.evaluation.results import Evidence

IntervalKind = Literal["seeds", "prompts", "none"]
"""What an interval says: how far seeds spread, how far one seed's prompts do, or that there is none."""


@dataclass(frozen=True, slots=True)
class MetricKind:
    """What a column measures."""

    name: str
    title: str
    definition: str
    higher_is_better: bool


KNOWN_METRICS = (
    MetricKind(
        "harmful_score",
        "Harmful score",
        "Share of held-out harmful prompts whose answer the primary judge calls harmful.",
        higher_is_better=False,
    ),
    MetricKind(
        "over_refusal",
        "Over-refusal",
        "Share of benign prompts that are refused: what safety costs the ordinary user.",
        higher_is_better=False,
    ),
    MetricKind(
        "finetune_accuracy",
        "Fine-tune accuracy",
        "Mean score on held-out rows of the task that the model was fine-tuned for.",
        higher_is_better=True,
    ),
    MetricKind(
        "skills_kept",
        "Skills kept",
        "Mean score on ordinary requests that the aligned model could already answer.",
        higher_is_better=True,
    ),
    MetricKind(
        "degeneration",
        "Degeneration",
        "Share of all answers that are no language: empty, loops, broken characters. A model that babbles is not safe.",
        higher_is_better=False,
    ),
    MetricKind(
        "refusal_rate",
        "Refused",
        "Share of held-out harmful prompts that are refused.",
        higher_is_better=True,
    ),
    MetricKind(
        "other_rate",
        "Neither",
        "Share of harmful prompts met with neither a refusal nor harm: garble, or an answer to something else. "
        "A broken model scores low on harm by this way alone.",
        higher_is_better=False,
    ),
)
"""In the order of the columns: harm, its price on benign requests, what was gained and lost, what is no language."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """One metric of one arm over its seeds."""

    name: str
    judge: str
    """Who judged; empty for what a task scores."""
    by_seed: Mapping[int, Metric]
    mean: float | None
    """Mean over the seeds that have a value; None where none has."""
    low: float | None
    high: float | None
    interval: IntervalKind

    @property
    def scale(self) -> tuple[float, float]:
        """The least and the greatest possible value."""
        return next(iter(self.by_seed.values())).scale

    @property
    def n(self) -> int:
        """Scored items, summed over seeds."""
        return sum(metric.n for metric in self.by_seed.values())

    @property
    def n_unscored(self) -> int:
        """Items that could not be scored, summed over seeds."""
        return sum(metric.n_unscored for metric in self.by_seed.values())

    @property
    def values(self) -> tuple[float, ...]:
        """The per-seed values that exist, in order of the seed."""
        return tuple(metric.value for metric in self.by_seed.values() if metric.value is not None)


@dataclass(frozen=True, slots=True)
class Difference:
    """An arm minus the reference arm, paired by seed."""

    paired: PairedDifference
    resolved: bool
    """Whether it is shown: p below 0.05; where all pairs are equal, whether the arms' own intervals part."""
    p_value: float | None = None
    """Corrected after Holm over all differences of the table; None where nothing could be tested."""


@dataclass(frozen=True, slots=True)
class JudgePair:
    """How far two judges agree on the answers of one arm, over its seeds."""

    judges: tuple[str, str]
    prompt_set: PromptSet
    n: int
    agreement: float | None
    """Share of equal outcomes among the `n` completions that both scored."""
    kappa: float | None
    """Mean of the seeds' kappas that are defined."""
    n_disputed: int


@dataclass(frozen=True, slots=True)
class CategoryRate:
    """One share of one arm on the prompts of one category, read by the primary judge, pooled over seeds."""

    prompt_set: PromptSet
    category: str
    name: str
    """Of the metric."""
    value: float | None
    n: int
    """Scored answers, summed over seeds."""
    low: float | None
    high: float | None
    """Clopper and Pearson's interval of the pooled counts; it takes answers of several seeds for independent."""


@dataclass(frozen=True, slots=True)
class EvidenceRow:
    """What was found of one answer of one run."""

    arm: str
    seed: int
    evidence: Evidence


@dataclass(frozen=True, slots=True)
class ModuleEffect:
    """What a patch did to one module, averaged over the seeds that have it."""

    module: str
    similarity: float
    shrinkage: float
    n_selected: int
    """Seeds in which the module was changed."""
    n_seeds: int


@dataclass(frozen=True, slots=True)
class PatchSummary:
    """One patch of one arm, module by module, in the order of the model."""

    patch: str
    settings: Mapping[str, Any]
    modules: tuple[ModuleEffect, ...]


Points = tuple[tuple[float, float], ...]
"""(step, value) pairs, in order of the step."""


@dataclass(frozen=True, slots=True)
class Training:
    """The logs of one training; arms that only patch its adapter share it."""

    arms: tuple[str, ...]
    curves: Mapping[str, Mapping[int, Points]]
    """Quantity (one of `training.QUANTITIES`) and seed to its points."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One row of the comparison: all results that share a label."""

    name: str
    seeds: tuple[int, ...]
    comparable: bool
    """Whether it was fine-tuned on the same task under the same attack as the reference."""
    control: bool
    """Whether its last patch is one of the controls that a projection must beat."""
    on_front: bool
    """Whether no comparable arm has a mean as good on harm and on accuracy, and better on one of them."""
    estimates: Mapping[str, Estimate]
    """By metric: the task's scores and the primary judge's rates."""
    differences: Mapping[str, Difference]
    """By metric, against the reference; empty for the reference itself."""
    other_judges: tuple[Estimate, ...]
    agreements: tuple[JudgePair, ...]
    categories: tuple[CategoryRate, ...]
    patches: tuple[PatchSummary, ...]
    experiment: Mapping[str, Any]
    """Configuration of the first seed."""
    varies: tuple[str, ...]
    """Fields of the configuration, `seed` aside, in which the arm's seeds differ."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What one arm answered. Its text is a model's: hostile until escaped."""

    arm: str
    seed: int
    text: str
    outcomes: Mapping[str, Outcome | None]
    score: float | None


@dataclass(frozen=True, slots=True)
class Question:
    """One prompt and every arm's answer to it, as far as the results kept them."""

    id: str
    prompt_set: PromptSet
    category: str
    prompt: tuple[Message, ...]
    reference: str
    answers: tuple[Answer, ...]


@dataclass(frozen=True, slots=True)
class Fact:
    """A line of provenance: one value where all results agree, more where they don't."""

    name: str
    values: tuple[tuple[str, str], ...]
    """Value, and whose it is: empty where it is everybody's."""


@dataclass(frozen=True, slots=True)
class StageTime:
    """Seconds of one kind of stage, each computed stage counted once however many results reuse it."""

    stage: str
    n_computed: int
    mean_seconds: float
    total_seconds: float


@dataclass(frozen=True, slots=True)
class Report:
    """A comparison of arms, ready to be written. Build it with `build_report`."""

    title: str
    reference: str | None
    answer: str
    """The comparison in one sentence, worked out from the numbers."""
    findings: tuple[str, ...]
    """What the numbers say beyond that sentence."""
    cautions: tuple[str, ...]
    """What a reader must know before believing the numbers."""
    notes: tuple[tuple[str, str], ...]
    """What the experiments say of themselves: the note, and whose it is."""
    metrics: tuple[MetricKind, ...]
    """Those that at least one arm measured, in the order of the columns."""
    judge: str
    """The primary judge; empty if nothing was judged."""
    arms: tuple[Arm, ...]
    trainings: tuple[Training, ...]
    questions: tuple[Question, ...]
    facts: tuple[Fact, ...]
    times: tuple[StageTime, ...]
    evidence_rows: tuple[EvidenceRow, ...]
    """Every prompt's outcome, as far as the evidence was given; in the order of the arms, seeds and prompts."""

    def arm(self, name: str) -> Arm:
        """The arm called `name`, which must be there."""
        return next(arm for arm in self.arms if arm.name == name)
