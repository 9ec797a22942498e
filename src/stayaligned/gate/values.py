"""What the gate is asked and what it answers, as values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field, model_validator

from stayaligned.core.records import Outcome, PromptSet, Record

SCHEMA_VERSION = 1

Answer = Literal["pass", "fail", "undecided"]
"""`undecided`: the interval reaches over the limit, so more prompts could go either way."""

Kind = Literal["increase", "drop", "ceiling"]
"""How far a rate may rise, or fall, against the baseline's; or where the candidate's must lie below."""

MeasureName = Literal["harm", "over_refusal", "utility", "skills", "degeneration"]


class Measure(Record):
    """A number of one answer, by which two models are compared."""

    name: MeasureName
    title: str
    prompt_sets: tuple[PromptSet, ...]
    outcome: Outcome | None = None
    """The judge's outcome that is counted; None where no judge is asked."""

    @property
    def higher_is_worse(self) -> bool:
        """Whether a rise is what a limit is set to."""
        return self.name not in ("utility", "skills")


MEASURES: dict[MeasureName, Measure] = {
    "harm": Measure(name="harm", title="harmful score", prompt_sets=("harmful",), outcome=Outcome.HARM),
    "over_refusal": Measure(name="over_refusal", title="over-refusal", prompt_sets=("benign",), outcome=Outcome.REFUSE),
    "utility": Measure(name="utility", title="fine-tune accuracy", prompt_sets=("task",)),
    "skills": Measure(name="skills", title="skills kept", prompt_sets=("skills",)),
    "degeneration": Measure(
        name="degeneration", title="degeneration", prompt_sets=("harmful", "benign", "task", "skills")
    ),
}
"""Every measure, in the order of a decision."""


class Limits(Record):
    """How much worse a candidate may be, as shares (0.02 is two percentage points); a limit of None is not checked."""

    max_harm_increase: float | None = Field(default=None, gt=0, le=1)
    """Largest allowed rise of the harmful score (2% is two points)."""
    max_over_refusal_increase: float | None = Field(default=None, gt=0, le=1)
    """Largest allowed rise of over-refusal."""
    max_utility_drop: float | None = Field(default=None, gt=0, le=1)
    """Largest allowed drop of the fine-tune accuracy."""
    max_skills_drop: float | None = Field(default=None, gt=0, le=1)
    """Largest allowed drop of the skills kept."""
    max_degeneration_increase: float | None = Field(default=None, gt=0, le=1)
    """Largest allowed rise of the share of degenerate completions."""
    max_harm: float | None = Field(default=None, gt=0, lt=1)
    """Largest allowed harmful score of the candidate."""
    max_over_refusal: float | None = Field(default=None, gt=0, lt=1)
    """Largest allowed over-refusal of the candidate."""
    max_degeneration: float | None = Field(default=None, gt=0, lt=1)
    """Largest allowed share of degenerate completions of the candidate."""
    max_unscored: float = Field(default=0.1, ge=0, le=1)
    """Largest share of unscored completions, of either model, with which a criterion can be decided."""
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    """Confidence level of the two-sided intervals."""

    @model_validator(mode="after")
    def _asks_something(self) -> Limits:
        if not any(True for _ in self.criteria()):
            raise ValueError("no limit is set")
        return self

    def criteria(self) -> Iterator[tuple[str, Measure, Kind, float]]:
        """Name, measure, kind and limit of everything that is asked."""
        for measure in MEASURES.values():
            change = "increase" if measure.higher_is_worse else "drop"
            asked: list[tuple[str, Kind]] = [
                (f"max_{measure.name}_{change}", change),
                (f"max_{measure.name}", "ceiling"),
            ]
            for name, kind in asked:
                limit: float | None = getattr(self, name) if name in Limits.model_fields else None
                if limit is not None:
                    yield name, measure, kind, limit


class Criterion(Record):
    """One limit, what was found, and what follows."""

    name: str
    """The limit's name: `max_harm_increase`."""
    title: str
    """What is measured: `harmful score`."""
    kind: Kind
    limit: float
    answer: Answer
    reason: str
    """The answer in a sentence."""
    judge: str = ""
    """Whose verdicts it rests on; empty where none was asked."""
    baseline: float | None = None
    """Mean over the prompts that both scored; None for a ceiling, or where nothing could be scored."""
    candidate: float | None = None
    change: float | None = None
    """How much worse the candidate is: its rise, or its drop where higher is better. For a ceiling its rate."""
    low: float | None = None
    high: float | None = None
    """Interval of `change`."""
    interval: str = ""
    """The name of the method."""
    n_prompts: int = 0
    n_seeds: int = 1
    unscored_baseline: int = 0
    unscored_candidate: int = 0
    p_fail: float | None = None
    """One-sided p-value of "not beyond the limit", adjusted after Holm for all criteria."""
    needed_prompts: int | None = None
    """Where undecided: prompts that would decide in four cases of five, if what was seen is the truth. An estimate."""


class SideSummary(Record):
    """Who was compared."""

    directories: tuple[str, ...]
    arm: str
    model: str
    seeds: tuple[int, ...]


class OtherJudge(Record):
    """What another judge's verdicts would decide."""

    judge: str
    answer: Answer
    criteria: tuple[Criterion, ...]


class Decision(Record):
    """The gate's answer, and everything that it rests on."""

    schema_version: int = SCHEMA_VERSION
    answer: Answer
    sentence: str
    confidence: float
    judge: str
    """The judge that decides; empty where no criterion asks one."""
    baseline: SideSummary
    candidate: SideSummary
    criteria: tuple[Criterion, ...]
    disagreements: tuple[OtherJudge, ...] = ()
    """Other judges that both sides have and that would decide otherwise."""
    notes: tuple[str, ...] = ()
