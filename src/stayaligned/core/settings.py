"""Settings that YAML names and that several packages read: generation, servers, lm-eval, safety probes. No torch."""

from __future__ import annotations

from typing import Any, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

TrainerKind = Literal["transformers", "sft"]
"""The class that trains: transformers' Trainer or TRL's SFTTrainer."""
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


class Endpoint(BaseModel):
    """A model behind a server, and how patiently to ask it; what a component that asks one takes over as its own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base_url: str
    """As OpenAI's clients take it, usually ending in /v1; `/chat/completions` is put behind it."""
    model: str
    api_key_env: str = "OPENAI_API_KEY"
    """The environment variable that holds the key; without it, requests carry none."""
    concurrency: int = Field(default=8, ge=1, le=512)
    """Requests at the same time."""
    timeout_seconds: float = Field(default=60.0, gt=0)
    """For one whole answer."""
    attempts: int = Field(default=6, ge=1)
    """Per conversation, the first included."""
    backoff_seconds: float = Field(default=0.5, ge=0)
    """The n-th wait is drawn evenly between 0 and this times 2ⁿ⁻¹, and comes on top of what Retry-After asks for."""
    patience_seconds: float = Field(default=120.0, ge=0)
    """The longest wait; a server that asks for more ends the run."""
    limit_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """How the request names its token limit; OpenAI's newer models take the second only."""

    @field_validator("base_url")
    @classmethod
    def _is_plain(cls, value: str) -> str:
        parts = urlsplit(value)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise ValueError("must be an http:// or https:// address")
        if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
            raise ValueError("must hold no user, password, query or fragment; the key goes into `api_key_env`")
        return value.rstrip("/")


HOW_TO_ASK = frozenset(Endpoint.model_fields) - {"model"}
"""Settings that say where and how patiently to ask, and not whom: no part of a component's identity.

The address is among them, so that a server may move without its answers being asked for again. So `model` must say
which weights answer: two servers that call different weights "judge" would be taken for one.
"""


class Generation(BaseModel):
    """How answers are written; greedy unless a temperature is set."""

    operational: ClassVar[frozenset[str]] = frozenset({"memory_mib"})
    """Settings that change no answer: they are no part of what identifies one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_new_tokens: int = Field(default=128, ge=1)
    """Tokens after which an answer is cut."""
    backend: Literal["transformers", "endpoint"] = "transformers"
    """Who writes: the model in this process, or a server that holds it."""
    endpoint: Endpoint | None = None
    """The server, for that backend."""
    memory_mib: int = Field(default=4096, ge=1)
    """Beside the weights: as many answers are written at once as fit; one in any case."""
    temperature: float = Field(default=0.0, ge=0)
    """0 takes the likeliest token; above it, samples."""
    seed: int = Field(default=0, ge=0)
    """Of the samples; without meaning at temperature 0."""

    def identity(self) -> dict[str, Any]:
        """The settings that an answer depends on."""
        kept = self.model_dump(mode="json", exclude={*self.operational, "backend", "endpoint"})
        if self.endpoint is not None:
            kept["endpoint"] = self.endpoint.model_dump(mode="json", include={"model"})
        return kept

    @model_validator(mode="after")
    def _fits_together(self) -> Generation:
        if (self.backend == "endpoint") != (self.endpoint is not None):
            raise ValueError("`backend: endpoint` and the settings `endpoint:` need each other: give both or neither")
        return self


class LmEval(BaseModel):
    """Tasks that lm-eval runs on the final model, each a stage of its own.

    Everything about a task is lm-eval's: its prompts, few-shot examples, splits and metrics. A YAML file in
    `include_path` may name Python code (`!function`), which then runs: give a folder that you trust. Files that a task
    reads from outside of that folder are no part of the stage's key.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    operational: ClassVar[frozenset[str]] = frozenset({"batch_size"})

    tasks: tuple[str, ...] = Field(min_length=1)
    """Names of tasks, groups or tags."""
    limit: int | None = Field(default=None, ge=1)
    """The first so many samples of each task; null takes all."""
    num_fewshot: int | None = Field(default=None, ge=0)
    """Examples before each question; null takes the task's own number. As in lm-eval, a task that sets 0 keeps 0."""
    include_path: str | None = None
    """A folder with YAML tasks of your own, which come before lm-eval's."""
    apply_chat_template: bool = False
    """Ask through the model's chat template; false is lm-eval's default, with which published numbers are made."""
    batch_size: int = Field(default=8, ge=1)

    @field_validator("tasks")
    @classmethod
    def _are_distinct(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        twice = sorted({name for name in value if value.count(name) > 1})
        if twice:
            raise ValueError(f"named twice: {', '.join(twice)}")
        return value

    def identity(self, task: str) -> dict[str, Any]:
        """What one task's values depend on, the model aside."""
        kept = {key: value for key, value in self.model_dump(mode="json").items() if key not in self.operational}
        return {**kept, "tasks": [task]}
