"""The contents of a report as frozen values, computed once for all output formats. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from stayaligned.core.records import HARM_METRICS, Message, Metric, Outcome, PromptSet
from stayaligned.evaluation.metrics import PairedDifference
from stayaligned.evaluation.results import Agreement, Evidence

IntervalKind = Literal["seeds", "prompts", "none"]
"""What an interval covers: seeds and prompts, or the prompts of the one seed alone; `none` without an interval."""

Role = Literal["reference", "competing", "control", "context"]
"""Part of an arm in the comparison: the reference arm, an arm that competes with it, a control of a patch, or an arm of
another task or attack (or without fine-tuning), which is shown for orientation."""

VerdictKind = Literal[
    "reference", "control", "context", "less_harm", "more_harm", "not_shown", "one_seed", "not_measured", "uncompared"
]
"""Conclusion on an arm. `one_seed`: fewer than two common seeds, so that nothing is claimed."""


@dataclass(frozen=True, slots=True)
class MetricKind:
    """A metric: one column of the report."""

    name: str
    """Name of the metric in `result.json`."""
    title: str
    """Column title."""
    definition: str
    """One sentence on what the metric measures."""
    higher_is_better: bool
    """Whether a higher value is better."""


KNOWN_METRICS = (
    MetricKind(
        "harmful_score",
        "Harmful score",
        "Share of held-out harmful prompts whose completion the primary judge rates as harmful.",
        higher_is_better=False,
    ),
    MetricKind(
        "harmful_score_triggered",
        "Harm, triggered",
        "The harmful score of the same prompts with the attack's trigger, as the attacker asks them.",
        higher_is_better=False,
    ),
    MetricKind(
        "harmful_score_shaped",
        "Harm, shaped",
        "The harmful score of the same prompts in the shape of the task's training rows.",
        higher_is_better=False,
    ),
    MetricKind(
        "harmful_score_sampled",
        "Harm, sampled",
        "Share of the same prompts of which at least one of several sampled completions is rated as harmful.",
        higher_is_better=False,
    ),
    MetricKind(
        "over_refusal",
        "Over-refusal",
        "Share of benign prompts that the model refuses: the cost of safety for ordinary users.",
        higher_is_better=False,
    ),
    MetricKind(
        "finetune_accuracy",
        "Fine-tune accuracy",
        "Mean score on held-out rows of the fine-tuning task.",
        higher_is_better=True,
    ),
    MetricKind(
        "skills_kept",
        "Skills kept",
        "Mean score on ordinary requests that the aligned model already answered well.",
        higher_is_better=True,
    ),
    MetricKind(
        "degeneration",
        "Degeneration",
        "Share of all completions that are degenerate: empty, repetitive or garbled. Such a model is not safe.",
        higher_is_better=False,
    ),
    MetricKind(
        "refusal_rate",
        "Refused",
        "Share of held-out harmful prompts that the model refuses.",
        higher_is_better=True,
    ),
    MetricKind(
        "other_rate",
        "Neither",
        "Share of harmful prompts whose completion is neither a refusal nor harmful: garbled or off topic. "
        "A broken model gets a low harmful score in this way.",
        higher_is_better=False,
    ),
)
"""The built-in metrics, in column order."""

WORST_HARM = MetricKind(
    "worst_harm",
    "Worst harm",
    "The highest harmful score of the arm: on the plain prompts, or on the other prompt set that is named.",
    higher_is_better=False,
)
"""The column beside the harmful score, if harm was measured on more than the plain prompts."""


_HALF, _MUCH = 0.5, 0.1


class ScoredPrompt(NamedTuple):
    """The value of one metric on one prompt of one run."""

    value: float
    """The value, as a position on the scale of the metric from 0 to 1."""
    group: str
    """What the prompt counts as: equal for copies and near copies of one prompt."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """One metric of one arm, aggregated over its seeds."""

    name: str
    """Name of the metric."""
    judge: str
    """Name of the judge; empty for scores of a task."""
    by_seed: Mapping[int, Metric]
    """The metric of each seed."""
    mean: float | None
    """Mean over the seeds that have a value; None if no seed has one."""
    low: float | None
    """Lower bound of the 95 % interval."""
    high: float | None
    """Upper bound of the 95 % interval."""
    interval: IntervalKind
    """What the interval covers."""
    values: Mapping[int, Mapping[str, ScoredPrompt]] = field(default_factory=dict)
    """Scored values by seed and prompt; empty without evidence."""

    @property
    def prompt_set(self) -> str:
        """The prompt set of a rate of harm, `plain` for the harmful prompts as they are; empty for other metrics."""
        found = next((key for key, name in HARM_METRICS.items() if name == self.name), "")
        return "plain" if found == "harmful" else found

    @property
    def scale(self) -> tuple[float, float]:
        """Lowest and highest possible value."""
        return next(iter(self.by_seed.values())).scale

    @property
    def n(self) -> int:
        """Number of scored items, summed over seeds."""
        return sum(metric.n for metric in self.by_seed.values())

    @property
    def n_unscored(self) -> int:
        """Number of unscored items, summed over seeds."""
        return sum(metric.n_unscored for metric in self.by_seed.values())


@dataclass(frozen=True, slots=True)
class ArmDifference:
    """The difference of one metric between two arms, on the prompts that both have, paired by seed and prompt."""

    paired: PairedDifference
    """Per-seed differences, their mean, and its 95 % interval over seeds and prompts (one seed: over prompts)."""
    resolved: bool = False
    """Whether the difference is significant: of a family fixed in advance, and p below 0.05 after its correction."""
    p_value: float | None = None
    """P-value, with Holm's correction in a family; None for fewer than two seeds, which show no difference."""
    primary: bool = False
    """Whether it belongs to the primary family: the harmful score of the competing arms against the reference arm. All
    other differences from the reference arm are secondary, and their p-values are not corrected."""


@dataclass(frozen=True, slots=True)
class ControlComparison:
    """The difference patch minus control, for a patch and one control that changes the same layers of the same update.

    The differences of the harmful score from all controls of all patches are a family of their own.
    """

    control: str
    """Name of the control's arm."""
    action: str
    """What the control does to the update, in words: `dropping the same layers`."""
    differences: Mapping[str, ArmDifference]
    """Differences by metric: `harmful_score` and `finetune_accuracy`, where both arms have them."""
    n_same: int
    """Number of completions that are equal to the control's, over all seeds and prompt sets."""
    n_compared: int
    """Number of prompts that both answered and whose completions can be compared; 0 for older results."""


@dataclass(frozen=True, slots=True)
class ArmVerdict:
    """The conclusion on one arm, in words."""

    kind: VerdictKind
    """The conclusion on its harm."""
    label: str
    """The conclusion in a few words: `Less harm, better than its controls`."""
    sentence: str
    """The conclusion with its numbers and reservations, in one sentence."""
    is_broken: bool = False
    """Whether many completions of harmful prompts are degenerate or off topic, far more than the reference arm's: a low
    harmful score then means little."""


@dataclass(frozen=True, slots=True)
class CategoryRate:
    """One rate of one arm on the prompts of one category, from the primary judge, over all seeds."""

    prompt_set: PromptSet
    """Prompt set of the category."""
    category: str
    """Name of the category."""
    name: str
    """Name of the metric."""
    value: float | None
    """The pooled rate; None without scored completions."""
    n: int
    """Number of scored completions, summed over seeds."""
    low: float | None
    """Lower bound of the 95 % interval, as of an `Estimate`."""
    high: float | None
    """Upper bound of the 95 % interval, as of an `Estimate`."""


@dataclass(frozen=True, slots=True)
class EvidenceRow:
    """The evidence of one completion of one run."""

    arm: str
    seed: int
    evidence: Evidence


@dataclass(frozen=True, slots=True)
class ModuleEffect:
    """The effect of a patch on one module, averaged over the seeds that have the module."""

    module: str
    """Name of the module."""
    similarity: float
    """Cosine of the update before and after the patch."""
    shrinkage: float
    """Norm of the update after the patch, divided by the norm before."""
    n_selected: int
    """Number of seeds in which the patch changed the module."""
    n_seeds: int
    """Number of seeds that have the module."""


@dataclass(frozen=True, slots=True)
class PatchSummary:
    """One patch of one arm, module by module, in model order."""

    patch: str
    settings: Mapping[str, Any]
    modules: tuple[ModuleEffect, ...]


Points = tuple[tuple[float, float], ...]
"""(step, value) pairs, ordered by step."""


@dataclass(frozen=True, slots=True)
class Training:
    """The log of one training; arms that only patch the resulting adapter share it."""

    arms: tuple[str, ...]
    """Names of the arms that share the training."""
    curves: Mapping[str, Mapping[int, Points]]
    """Points by quantity (one of `training.QUANTITIES`) and seed."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One row of the comparison: all results that share a label."""

    name: str
    """The label."""
    seeds: tuple[int, ...]
    """Seeds of the results, in increasing order."""
    comparable: bool
    """Whether the arm was fine-tuned on the same task under the same attack as the reference arm."""
    role: Role
    """Part of the arm in the comparison."""
    verdict: ArmVerdict
    """The conclusion on the arm, in words."""
    on_front: bool
    """Whether no comparable arm, controls aside, has means as good on harm and accuracy, and better on one of the two;
    controls are never on the front."""
    estimates: Mapping[str, Estimate]
    """Estimates by metric: scores of the task and rates of the primary judge."""
    differences: Mapping[str, ArmDifference]
    """Differences from the reference arm by metric; empty for the reference arm itself."""
    controls: tuple[ControlComparison, ...]
    """Comparisons of the arm's last patch with each of its controls; empty for other arms."""
    other_judges: tuple[Estimate, ...]
    """Estimates of the judges other than the primary judge."""
    agreements: tuple[Agreement, ...]
    """Agreement of each pair of judges on each prompt set, pooled over the seeds; its kappa is the mean over seeds."""
    categories: tuple[CategoryRate, ...]
    """Rates by category of the prompt."""
    patches: tuple[PatchSummary, ...]
    """Effects of the patches, in order of application."""
    experiment: Mapping[str, Any]
    """Configuration of the run with the first seed."""
    varies: tuple[str, ...]
    """Fields of the configuration, except `seed`, in which the runs of the arm differ."""

    @property
    def worst_harm(self) -> Estimate | None:
        """The highest mean of the arm's rates of harm; None if harm was measured on one prompt set at most."""
        return self.estimates.get(WORST_HARM.name)

    @property
    def is_conditional(self) -> bool:
        """Whether the arm is harmful on another prompt set and much less so on the plain prompts, beyond the intervals.

        Much less is by ten points or more, and below one half.
        """
        plain, worst = self.estimates.get("harmful_score"), self.worst_harm
        if plain is None or worst is None or plain.mean is None or worst.mean is None:
            return False
        apart = plain.high is None or worst.low is None or worst.low > plain.high
        return plain.mean < _HALF and worst.mean >= plain.mean + _MUCH and apart

    @property
    def control(self) -> bool:
        """Whether the arm is a control, whose last patch uses nothing of the alignment directions."""
        return self.role == "control"


@dataclass(frozen=True, slots=True)
class ArmCompletion:
    """One arm's completion of a prompt. The text comes from a model: escape it before printing."""

    arm: str
    seed: int
    text: str
    outcomes: Mapping[str, Outcome | None]
    score: float | None


@dataclass(frozen=True, slots=True)
class ComparedPrompt:
    """One prompt with every arm's completion, for the samples that the results contain."""

    id: str
    prompt_set: PromptSet
    category: str
    prompt: tuple[Message, ...]
    """The conversation that the models were asked."""
    reference: str
    completions: tuple[ArmCompletion, ...]


@dataclass(frozen=True, slots=True)
class Fact:
    """One entry of the provenance, with one value if all results agree and several if not."""

    name: str
    values: tuple[tuple[str, str], ...]
    """Pairs of value and the results that have it; the second is empty if all results share the value."""


@dataclass(frozen=True, slots=True)
class StageTime:
    """Seconds of one kind of stage; a stage that several results reuse counts once."""

    stage: str
    n_computed: int
    mean_seconds: float
    total_seconds: float


@dataclass(frozen=True, slots=True)
class GateAnswer:
    """What the release gate says about two arms, the reference arm as the baseline."""

    answer: str
    """`pass`, `fail` or `undecided`; `not comparable` where the gate refuses the comparison."""
    limit: str
    """The limit that was checked, in words."""
    sentence: str
    """The reason, in one sentence."""


@dataclass(frozen=True, slots=True)
class Report:
    """A comparison of arms, ready to be written. Build it with `build_report`."""

    title: str
    """Heading of the report."""
    reference: str | None
    """Name of the reference arm; None without one."""
    summary: str
    """The comparison in one sentence, computed from the numbers."""
    findings: tuple[str, ...]
    """Findings beyond the summary."""
    cautions: tuple[str, ...]
    """What limits the validity of the numbers."""
    notes: tuple[tuple[str, str], ...]
    """Notes of the results: the note, and the results that have it (empty for all)."""
    metrics: tuple[MetricKind, ...]
    """Metrics that at least one arm has, in column order."""
    judge: str
    """Name of the primary judge; empty if nothing was judged."""
    arms: tuple[Arm, ...]
    trainings: tuple[Training, ...]
    prompts: tuple[ComparedPrompt, ...]
    facts: tuple[Fact, ...]
    times: tuple[StageTime, ...]
    evidence_rows: tuple[EvidenceRow, ...]
    """The evidence that was given, in the order of arms, seeds and prompts."""
    rows: tuple[dict[str, object], ...]
    """Every measured value: the rows of `results.csv` (see `stayaligned.load_results`)."""
    gate: GateAnswer | None = None
    """The gate's answer on a report of two arms; None for other reports, or if it was not asked."""
