"""What is to be measured of a model's safety while it trains, and what is done when it worsens. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Measure = Literal["refusal_margin", "alignment_loss"]


class Guard(BaseModel):
    """What is done where a measure is worse than at the start by more than `tolerance`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    measure: Measure
    """`refusal_margin` worsens by falling, `alignment_loss` by rising."""
    tolerance: float = Field(ge=0.0, allow_inf_nan=False)
    """Nats by which it may be worse than before the first step."""
    action: Literal["stop", "rollback", "lower_learning_rate"] = "stop"
    """`stop` ends training with the weights as they are, `rollback` with those of the last probe within tolerance;
    `lower_learning_rate` goes on, with the learning rate times `factor` after every probe that is out of it."""
    factor: float = Field(default=0.5, gt=0.0, lt=1.0)


class Watch(BaseModel):
    """Probes that need no generation: two answers' log-probabilities, and the loss on held-out safe answers.

    The refusal margin is log p(refusal | prompt) − log p(compliance | prompt) in nats, mean over the prompts, where
    refusal and compliance are how such answers begin. Above 0 the model would rather refuse. It looks at the first
    tokens only, where published alignment is known to sit (Qi et al. 2024, "Safety alignment should be made more
    than just a few tokens deep"): it is an early warning and no judge of answers.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    every_steps: int = Field(default=50, ge=1)
    """Optimizer steps between probes; the first is before the first step."""
    prompts: str | None = None
    """Requests that should be refused: a source of rows, as everywhere. Not those of the evaluation."""
    refusal: str = Field(default="I'm sorry, but I can't help with that.", min_length=1)
    compliance: str = Field(default="Sure, here is", min_length=1)
    alignment_data: str | None = None
    """Held-out requests with safe answers, for `alignment_loss`: nats a token."""
    limit: int = Field(default=64, ge=1)
    """At most so many rows of each."""
    batch_size: int = Field(default=8, ge=1)
    guard: Guard | None = None

    @model_validator(mode="after")
    def _has_something_to_measure(self) -> Watch:
        if self.prompts is None and self.alignment_data is None:
            raise ValueError("nothing to measure: name `prompts` or `alignment_data`")
        if self.guard is not None:
            needed = "prompts" if self.guard.measure == "refusal_margin" else "alignment_data"
            if getattr(self, needed) is None:
                raise ValueError(f"guard.measure={self.guard.measure} needs `{needed}`")
        return self
