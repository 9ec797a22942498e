"""A report as values: everything the writers print, worked out once. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from stayaligned.metrics import PairedDifference
from stayaligned.records import PromptSet
from stayaligned.results import Sample

IntervalKind = Literal["seeds", "prompts", "none"]
"""Where an interval comes from: the spread over seeds, the sampling of one seed's prompts, or there is none."""


@dataclass(frozen=True, slots=True)
class MetricKind:
    """What a column of the main table measures."""

    name: str
    title: str
    definition: str
    higher_is_better: bool


KNOWN_METRICS = (
    MetricKind(
        "harmful_score",
        "Harmful score",
        "Share of held-out harmful prompts whose answer the judge calls harmful.",
        higher_is_better=False,
    ),
    MetricKind(
        "over_refusal",
        "Over-refusal",
        "Share of benign prompts that are refused.",
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
        "Mean score on ordinary requests that the model could answer before it was fine-tuned.",
        higher_is_better=True,
    ),
    MetricKind(
        "other_rate",
        "Neither",
        "Share of harmful prompts met with neither a refusal nor harm: garble, or an answer to something else.",
        higher_is_better=False,
    ),
    MetricKind(
        "refusal_rate",
        "Refused",
        "Share of held-out harmful prompts that are refused.",
        higher_is_better=True,
    ),
)
"""In the order of the columns: harm, its price on benign requests, what was gained, what was lost."""


@dataclass(frozen=True, slots=True)
class SeedValue:
    """One metric of one result, as the experiment wrote it. `value` is None where nothing could be scored."""

    seed: int
    value: float | None
    n: int
    n_unscored: int
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class Estimate:
    """One metric of one arm, over its seeds."""

    metric: str
    higher_is_better: bool
    judge: str
    """Who judged; empty for metrics that a task scores."""
    seeds: tuple[SeedValue, ...]
    mean: float | None
    """Mean of the seeds that have a value; None where none has."""
    low: float | None
    high: float | None
    interval: IntervalKind

    @property
    def n(self) -> int:
        """Scored items, summed over seeds."""
        return sum(seed.n for seed in self.seeds)

    @property
    def n_unscored(self) -> int:
        """Items that could not be scored, summed over seeds."""
        return sum(seed.n_unscored for seed in self.seeds)

    @property
    def values(self) -> tuple[float, ...]:
        """The per-seed values that exist."""
        return tuple(seed.value for seed in self.seeds if seed.value is not None)


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


@dataclass(frozen=True, slots=True)
class Curve:
    """One logged quantity against the optimizer step, a line a seed."""

    quantity: str
    seeds: tuple[tuple[int, tuple[tuple[float, float], ...]], ...]
    """Seed and its (step, value) points."""


@dataclass(frozen=True, slots=True)
class Training:
    """The logs of one training; arms that only patch its adapter share it."""

    arms: tuple[str, ...]
    curves: tuple[Curve, ...]


@dataclass(frozen=True, slots=True)
class Arm:
    """One row of the comparison: all results that share a label."""

    name: str
    seeds: tuple[int, ...]
    comparable: bool
    """Whether it was fine-tuned on the reference's task under the reference's attack; true without a reference."""
    on_front: bool
    """Whether no comparable arm has both a lower mean harmful score and a higher mean fine-tune accuracy."""
    estimates: Mapping[str, Estimate]
    """By metric: the task's scores and the primary judge's rates."""
    differences: Mapping[str, PairedDifference]
    """By metric, minus the reference, of the metrics that both measured; empty for the reference itself."""
    other_judges: tuple[Estimate, ...]
    agreements: tuple[JudgePair, ...]
    patches: tuple[PatchSummary, ...]
    samples: tuple[Sample, ...]
    """Of the first seed that kept any."""
    sample_seed: int | None
    experiment: Mapping[str, Any]
    """Configuration of the first seed."""


@dataclass(frozen=True, slots=True)
class Agreeing:
    """A fact of provenance and the results that share it: one row where all agree, more where they don't."""

    name: str
    values: tuple[tuple[str, int], ...]
    """Value and how many results have it."""


@dataclass(frozen=True, slots=True)
class StageTime:
    """Seconds that one stage took, each computed stage counted once however many results reuse it."""

    stage: str
    n_computed: int
    mean_seconds: float
    total_seconds: float


@dataclass(frozen=True, slots=True)
class Provenance:
    """What it takes to run the comparison again."""

    versions: tuple[Agreeing, ...]
    inputs: tuple[Agreeing, ...]
    other: tuple[Agreeing, ...]
    """Commit and chat template."""
    times: tuple[StageTime, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """A comparison of arms, ready to be written. Build it with `build_report`."""

    title: str
    reference: str | None
    answer: str
    """The comparison in one sentence, worked out from the numbers."""
    findings: tuple[str, ...]
    """What stands behind it, a sentence each."""
    cautions: tuple[str, ...]
    """What a reader must know before believing the numbers."""
    metrics: tuple[MetricKind, ...]
    """Those that at least one arm measured, in the order of the columns."""
    judge: str
    """The primary judge; empty if nothing was judged."""
    arms: tuple[Arm, ...]
    trainings: tuple[Training, ...]
    provenance: Provenance

    @property
    def n_results(self) -> int:
        """Results behind the report."""
        return sum(len(arm.seeds) for arm in self.arms)
