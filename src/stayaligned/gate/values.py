"""Limits and decisions of the gate, as values."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from stayaligned.core.records import HARM_SETS, PLAIN_SETS, Outcome, PromptSet, Record
from stayaligned.gate.looks import Look, level_at, parse_look

SCHEMA_VERSION = 1

Conclusion = Literal["pass", "fail", "undecided"]
"""A conclusion of the gate. `undecided`: the interval contains the limit, so more prompts could decide either way."""

LimitKind = Literal["increase", "drop", "ceiling"]
"""What a limit restricts: the rise or drop against the baseline, or (`ceiling`) the candidate's own rate."""

Comparison = Literal["baseline", "anchor"]
"""The model that a limit compares the candidate with: the one in use, or a fixed earlier one."""

ComparedMetricName = Literal["harm", "over_refusal", "utility", "skills", "degeneration"]


class ComparedMetric(Record):
    """A metric by which two models are compared, computed from one value per completion."""

    name: ComparedMetricName
    """Name in the limits: `harm` in `max_harm_increase`."""
    title: str
    """Name in sentences: `harmful score`."""
    prompt_sets: tuple[PromptSet, ...]
    """Prompt sets whose completions count."""
    outcome: Outcome | None = None
    """Outcome of the judge that counts; None for metrics without a judge."""

    @property
    def higher_is_worse(self) -> bool:
        """Whether limits restrict a rise of the metric, not a drop."""
        return self.name not in ("utility", "skills")


COMPARED_METRICS: dict[ComparedMetricName, ComparedMetric] = {
    "harm": ComparedMetric(name="harm", title="harmful score", prompt_sets=HARM_SETS, outcome=Outcome.HARM),
    "over_refusal": ComparedMetric(
        name="over_refusal", title="over-refusal", prompt_sets=("benign",), outcome=Outcome.REFUSE
    ),
    "utility": ComparedMetric(name="utility", title="fine-tune accuracy", prompt_sets=("task",)),
    "skills": ComparedMetric(name="skills", title="skills kept", prompt_sets=("skills",)),
    "degeneration": ComparedMetric(name="degeneration", title="degeneration", prompt_sets=PLAIN_SETS),
}
"""Every compared metric, in the order of the criteria of a decision."""


def split_by_set(metric: ComparedMetric, measured: Collection[PromptSet]) -> Iterator[ComparedMetric]:
    """Yield a metric for each of its prompt sets that was measured, if it is one of harm or of degeneration.

    So a few prompts of one set do not vanish among many others, and the plain harmful prompts do not hide the rest.
    """
    if metric.name not in ("harm", "degeneration"):
        yield metric
        return
    for prompt_set in metric.prompt_sets:
        if prompt_set in measured:
            title = f"{metric.title} on {prompt_set} prompts"
            if metric.name == "harm":
                title = metric.title if prompt_set == "harmful" else f"{metric.title} ({prompt_set})"
            yield metric.model_copy(update={"prompt_sets": (prompt_set,), "title": title})


class Limits(Record):
    """How much worse a candidate may be, as shares (0.02 is two percentage points); a limit of None is not checked."""

    max_harm_increase: float | None = Field(default=None, gt=0, le=1)
    """Largest allowed rise of the harmful score, on each prompt set that measures harm (2% is two points)."""
    max_over_refusal_increase: float | None = Field(default=None, gt=0, le=1)
    """Largest allowed rise of over-refusal."""
    max_utility_drop: float | None = Field(default=None, gt=0, le=1)
    """Largest allowed drop of the fine-tune accuracy."""
    max_skills_drop: float | None = Field(default=None, gt=0, le=1)
    """Largest allowed drop of the skills kept."""
    max_degeneration_increase: float | None = Field(default=None, gt=0, le=1)
    """Largest allowed rise of the share of degenerate completions."""
    max_harm: float | None = Field(default=None, gt=0, lt=1)
    """Largest allowed harmful score of the candidate, on each prompt set that measures harm."""
    max_over_refusal: float | None = Field(default=None, gt=0, lt=1)
    """Largest allowed over-refusal of the candidate."""
    max_degeneration: float | None = Field(default=None, gt=0, lt=1)
    """Largest allowed share of degenerate completions of the candidate."""
    max_unscored: float = Field(default=0.1, ge=0, le=1)
    """Largest share of unscored completions, of either model, with which a criterion can be decided."""
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    """Confidence level of the two-sided intervals; with `non_inferiority`, of each bound."""
    non_inferiority: bool = False
    """Test each limit at the one-sided level 1 - confidence (5%), instead of half of it on either side."""
    look: Look | None = None
    """Which of several planned looks at a growing evaluation this is: K/N, for example 2/4."""

    @field_validator("look", mode="before")
    @classmethod
    def _parse_look(cls, value: Any) -> Any:
        return parse_look(value) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _asks_something(self) -> Limits:
        if not any(True for _ in self.criteria()):
            raise ValueError("no limit is set")
        return self

    @property
    def alpha(self) -> float:
        """One-sided error rate of a pass, and of a fail, over all planned looks."""
        return (1 - self.confidence) / (1 if self.non_inferiority else 2)

    @property
    def exact(self) -> bool:
        """Whether bounds hold without assuming a distribution, as the levels of declared modes require."""
        return self.non_inferiority or self.look is not None

    @property
    def interval_confidence(self) -> float:
        """Confidence level of the two-sided interval whose bounds decide, at this look."""
        return self.confidence if self.look is None and not self.non_inferiority else 1 - 2 * self._level(self.look)

    @property
    def last_confidence(self) -> float:
        """`interval_confidence` at the last planned look."""
        return self.interval_confidence if self.look is None else 1 - 2 * self._level(self.look.last)

    def _level(self, look: Look | None) -> float:
        return self.alpha if look is None else level_at(look, self.alpha)

    def criteria(self) -> Iterator[tuple[str, ComparedMetric, LimitKind, float]]:
        """Yield name, metric, kind and limit of every limit that is set."""
        for metric in COMPARED_METRICS.values():
            change = "increase" if metric.higher_is_worse else "drop"
            limits: list[tuple[str, LimitKind]] = [
                (f"max_{metric.name}_{change}", change),
                (f"max_{metric.name}", "ceiling"),
            ]
            for name, kind in limits:
                limit: float | None = getattr(self, name) if name in Limits.model_fields else None
                if limit is not None:
                    yield name, metric, kind, limit


class SideQuality(Record):
    """A judge against people's labels of the completions of one model."""

    sensitivity: float | None
    """Share of the completions that people call harmful (or a refusal) which the judge calls so; None if there are
    none."""
    sensitivity_interval: tuple[float, float] | None
    """95 % interval of the sensitivity."""
    specificity: float | None
    """Share of the other completions which the judge does not call so."""
    specificity_interval: tuple[float, float] | None
    """95 % interval of the specificity."""
    kappa: float | None
    """Cohen's κ of judge and people; None where it is undefined."""
    kappa_at_worst: float | None
    """The same with each label that gives no outcome counted as a disagreement; this is compared with the floor."""
    n: int
    """Number of labelled completions that the judge scored."""


class Correction(Record):
    """How people's labels corrected what the judge measured."""

    n_labelled: int
    """Number of labelled prompts, summed over the seeds; those that people are unsure about are not counted."""
    n_items: int
    """Number of prompts that they were drawn from, summed over the seeds."""
    labellers: int
    """Number of people who gave the labels."""
    judge_weight: float
    """λ, the weight of the judge's values within the strata of the draw; 1 if they do not vary there."""
    uncorrected: float | None = None
    """The judge's `change`: that of all prompts by its verdicts alone."""
    uncorrected_low: float | None = None
    """Lower bound of the interval of `uncorrected`."""
    uncorrected_high: float | None = None
    """Upper bound of the interval of `uncorrected`."""
    needed_labels: int | None = None
    """If undecided: estimated number of labelled prompts, of these ones, that would decide with probability 0.8."""
    baseline: SideQuality | None = None
    """The judge on the baseline's completions; None for a limit on the candidate's own rate."""
    candidate: SideQuality
    """The judge on the candidate's completions."""
    min_agreement: float | None = None
    """Least κ, on each of these sides, with which this judge may decide; None if none was demanded."""


class Criterion(Record):
    """One limit with the measured values and the conclusion."""

    name: str
    """Name of the limit, for example `max_harm_increase`."""
    title: str
    """Title of the metric, for example `harmful score`."""
    prompt_sets: tuple[PromptSet, ...] = ()
    """Prompt sets whose completions count. A limit on harm or on degeneration is one criterion for each prompt set."""
    kind: LimitKind
    """What the limit restricts."""
    against: Comparison = "baseline"
    """Model that the candidate is compared with; a limit on the candidate's own rate compares with none."""
    limit: float
    """The limit, as a share."""
    answer: Conclusion
    """Conclusion on this limit."""
    reason: str
    """Reason for the conclusion, in words."""
    judge: str = ""
    """Judge whose verdicts count; empty for metrics without a judge."""
    baseline: float | None = None
    """Mean of the baseline (with `against: anchor`, of the anchor) over the prompts scored for both models; None for a
    ceiling, or if nothing was scored."""
    candidate: float | None = None
    """Candidate's mean over the prompts scored for both models (for a ceiling: over its scored prompts)."""
    change: float | None = None
    """How much worse the candidate is: its rise, or its drop if higher is better. For a ceiling: its rate."""
    low: float | None = None
    """Lower bound of the interval of `change`."""
    high: float | None = None
    """Upper bound of the interval of `change`."""
    interval: str = ""
    """Method of the interval."""
    n_prompts: int = 0
    """Number of different prompts that count; copies and near copies of one prompt are one."""
    n_seeds: int = 1
    """Number of seeds that count."""
    unscored_baseline: int = 0
    """Number of unscored completions of the baseline."""
    unscored_candidate: int = 0
    """Number of unscored completions of the candidate."""
    p_fail: float | None = None
    """One-sided p-value of "not beyond the limit", corrected for planned looks and (Holm) for all criteria."""
    needed_prompts: int | None = None
    """If undecided: estimated number of prompts that would decide with probability 0.8, given the measured change; with
    labels, of a larger set with the same share labelled."""
    correction: Correction | None = None
    """How labels corrected it; None if the judge's verdicts alone decide."""


class SideSummary(Record):
    """Description of the baseline or the candidate."""

    directories: tuple[str, ...]
    """Directories of its runs."""
    arm: str
    """Label of the arm."""
    model: str
    """Adapter or model of the first run."""
    seeds: tuple[int, ...]
    """Seeds of the runs."""


class OtherJudge(Record):
    """The conclusion from the verdicts of another judge."""

    judge: str
    """Name of the other judge."""
    answer: Conclusion
    """Conclusion from its verdicts."""
    criteria: tuple[Criterion, ...]
    """Criteria computed from its verdicts."""


class Decision(Record):
    """The conclusion of the gate with everything that it was computed from."""

    schema_version: int = SCHEMA_VERSION
    """Version of this format; raised when a field changes its meaning."""
    answer: Conclusion
    """Overall conclusion."""
    sentence: str
    """Overall conclusion with reasons, in one sentence."""
    confidence: float
    """Confidence level of the two-sided intervals; with `non_inferiority`, of each bound."""
    non_inferiority: bool = False
    """Whether each limit was tested at the one-sided level 1 - confidence."""
    look: Look | None = None
    """Which of the planned looks this is: its number, and how many are planned."""
    interval_confidence: float = 0.95
    """Confidence level of the two-sided intervals of the criteria, at this look."""
    judge: str
    """Judge whose verdicts count; empty if no criterion uses a judge."""
    baseline: SideSummary
    """The baseline."""
    candidate: SideSummary
    """The candidate."""
    anchor: SideSummary | None = None
    """The fixed model that the candidate was also compared with."""
    criteria: tuple[Criterion, ...]
    """Every limit with its conclusion."""
    disagreements: tuple[OtherJudge, ...] = ()
    """Other judges of both models whose verdicts lead to another conclusion."""
    notes: tuple[str, ...] = ()
    """Notes of the runs, and differences in versions."""
