"""Settings that several packages read: generation, servers, lm-eval, safety probes, curvature. Imports no torch."""

from __future__ import annotations

import datetime
import math
from typing import Any, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from stayaligned.core.records import Record

TrainerKind = Literal["transformers", "sft"]
"""The class that trains: transformers' Trainer or TRL's SFTTrainer."""
Measure = Literal["refusal_margin", "alignment_loss"]


class ChatTemplate(Record):
    """How conversations are rendered: the chat template, its arguments, and the date that it writes.

    Training, generation, the perplexity check, safety probes and lm-eval render alike.
    """

    file: str | None = None
    """A Jinja file with the chat template, for a model without one, or instead of its own. Not for a server."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Variables that the template reads, such as `enable_thinking: false` or `reasoning_effort: low`. A server receives
    them as `chat_template_kwargs`."""
    date: datetime.date = datetime.date(2024, 7, 26)
    """The date for templates that write today's (Llama 3.2, gpt-oss, Granite): fixed, so that a run on another day
    has the same prompts. The default is the one that Llama 3's templates contain. A server writes its own date."""

    @field_validator("file")
    @classmethod
    def _is_a_jinja_file(cls, value: str | None) -> str | None:
        if value is not None and not value.endswith(".jinja"):
            raise ValueError(f"expected the path of a .jinja file, found {value!r}")
        return value

    @field_validator("arguments")
    @classmethod
    def _are_variables(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name, given in value.items():
            if not name.isidentifier() or name in {"messages", "add_generation_prompt"}:
                raise ValueError(f"{name!r} can't be an argument of a chat template")
            _require_json(name, given)
        return value

    @model_validator(mode="before")
    @classmethod
    def _or_a_file(cls, value: Any) -> Any:
        return {"file": value} if isinstance(value, str) else value

    def identity(self) -> dict[str, Any]:
        """Return the settings that a rendered conversation depends on."""
        return self.model_dump(mode="json")


def _require_json(name: str, value: Any) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{name}: the key {key!r} must be text")
            _require_json(name, item)
    elif isinstance(value, list):
        for item in value:
            _require_json(name, item)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name}: {value} is not a finite number")
    elif not (value is None or isinstance(value, str | int | float | bool)):
        raise ValueError(f"{name}: expected text, numbers, lists or mappings, found {type(value).__name__}")


class Guard(Record):
    """The action to take when a measure of safety is worse than at the start of training by more than a tolerance."""

    measure: Measure
    """The measure to compare with its value at the start: `refusal_margin` must not fall, `alignment_loss` not rise."""
    tolerance: float = Field(ge=0.0, allow_inf_nan=False)
    """Amount in nats by which the measure may be worse than before the first step."""
    action: Literal["stop", "rollback", "lower_learning_rate"] = "stop"
    """The action at a probe that exceeds the tolerance. `stop` ends training with the current weights, `rollback` with
    those of the last probe within the tolerance; `lower_learning_rate` continues, with the learning rate multiplied by
    `factor` at every such probe."""
    factor: float = Field(default=0.5, gt=0.0, lt=1.0)
    """Factor of the learning rate for the action `lower_learning_rate`."""


class Watch(Record):
    """Safety probes during training that generate no text: the refusal margin and the alignment loss.

    The refusal margin is log p(refusal | prompt) − log p(compliance | prompt) in nats, averaged over the prompts, where
    `refusal` and `compliance` are beginnings of such completions. Above 0 the model is more likely to refuse. The
    margin measures the first tokens only, on which alignment is known to act most (Qi et al. 2024, "Safety alignment
    should be made more than just a few tokens deep"): it is an early warning and does not replace a judge.
    """

    every_steps: int = Field(default=50, ge=1)
    """Number of optimizer steps between two probes; the first probe is before the first step."""
    prompts: str | None = None
    """Source of harmful prompts for the refusal margin; use other prompts than those of the evaluation."""
    refusal: str = Field(default="I'm sorry, but I can't help with that.", min_length=1)
    """Beginning of a completion that refuses."""
    compliance: str = Field(default="Sure, here is", min_length=1)
    """Beginning of a completion that complies."""
    alignment_data: str | None = None
    """Source of held-out requests with safe answers, for the alignment loss (nats per token)."""
    limit: int = Field(default=64, ge=1)
    """Maximum number of rows to use of `prompts` and of `alignment_data`."""
    batch_size: int = Field(default=8, ge=1)
    """Number of rows per forward pass."""
    guard: Guard | None = None
    """What to do when a measure worsens; null only records the measures."""

    @model_validator(mode="after")
    def _has_something_to_measure(self) -> Watch:
        if self.prompts is None and self.alignment_data is None:
            raise ValueError("nothing to measure: set `prompts` or `alignment_data`")
        if self.guard is not None:
            needed = "prompts" if self.guard.measure == "refusal_margin" else "alignment_data"
            if getattr(self, needed) is None:
                raise ValueError(f"guard.measure={self.guard.measure} needs `{needed}`")
        return self


class Endpoint(Record):
    """An OpenAI-compatible server: its address, its model, and limits for requests and retries."""

    base_url: str
    """Base URL of the server, usually ending in /v1; requests go to `/chat/completions` below it."""
    model: str
    """Name of the model, as the server knows it."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that contains the API key; if it is not set, requests carry no key."""
    concurrency: int = Field(default=8, ge=1, le=512)
    """Number of concurrent requests."""
    timeout_seconds: float = Field(default=60.0, gt=0)
    """Time limit of one request, from sending it to the complete reply."""
    attempts: int = Field(default=6, ge=1)
    """Maximum number of attempts per conversation, including the first."""
    backoff_seconds: float = Field(default=0.5, ge=0)
    """The n-th wait before a retry is uniform between 0 and this times 2ⁿ⁻¹, added to what Retry-After asks for."""
    patience_seconds: float = Field(default=120.0, ge=0)
    """Longest wait before a retry; a server that asks for a longer wait ends the run."""
    limit_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """Name of the token limit in the request; OpenAI's newer models accept only `max_completion_tokens`."""

    @field_validator("base_url")
    @classmethod
    def _is_plain(cls, value: str) -> str:
        parts = urlsplit(value)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise ValueError("must be an http:// or https:// address")
        if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
            raise ValueError("must contain no user, password, query or fragment; the key belongs in `api_key_env`")
        return value.rstrip("/")


HOW_TO_ASK = frozenset(Endpoint.model_fields) - {"model"}
"""Settings of an endpoint that are not part of a component's identity: all but the model.

The address is one of them, so that stored replies are reused when a server moves. `model` must therefore identify the
weights: replies of two servers that call different weights "judge" would be mixed up.
"""


class ServedModel(Endpoint):
    """The server of the model that is evaluated."""

    base_model: str | None = None
    """Name, on the same server, of the model without the adapter that `model` adds (vLLM's `--lora-modules`). If it is
    set, a probe checks first that the two answer differently; a server may ignore an adapter without a word."""


class Generation(Record):
    """Settings for generating completions; greedy unless a temperature is set."""

    operational: ClassVar[frozenset[str]] = frozenset({"memory_mib"})
    """Settings that change no completion; not in `identity()`."""

    max_new_tokens: int = Field(default=128, ge=1)
    """Maximum number of tokens of a completion."""
    backend: Literal["transformers", "endpoint"] = "transformers"
    """Where completions are generated: by transformers in this process, or by a server."""
    endpoint: ServedModel | None = None
    """The server, for `backend: endpoint`."""
    memory_mib: int = Field(default=4096, ge=1)
    """Memory in MiB beside the weights; it limits the number of completions generated at once (at least one)."""
    temperature: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Sampling temperature; 0 takes the most likely token."""
    seed: int = Field(default=0, ge=0)
    """Seed of the sampling; has no effect at temperature 0 without `samples`."""
    samples: int = Field(default=0, ge=0)
    """Number of completions to sample of each harmful prompt, beside the one above; the worst of them counts."""
    sample_temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Temperature of these samples."""

    def sampling(self) -> Generation:
        """Return the settings of the samples of harmful prompts."""
        return self.model_copy(update={"temperature": self.sample_temperature})

    def identity(self) -> dict[str, Any]:
        """Return the settings that a completion depends on."""
        unused = () if self.samples else ("samples", "sample_temperature")
        settings = self.model_dump(mode="json", exclude={*self.operational, *unused, "backend", "endpoint"})
        if self.endpoint is not None:
            settings["endpoint"] = self.endpoint.model_dump(mode="json", include={"model"})
        return settings

    @model_validator(mode="after")
    def _fits_together(self) -> Generation:
        if (self.backend == "endpoint") != (self.endpoint is not None):
            raise ValueError("`backend: endpoint` and the settings `endpoint:` need each other: set both or neither")
        return self


class LmEval(Record):
    """Tasks that lm-eval runs on the final model, each in its own stage.

    lm-eval defines everything about a task: prompts, few-shot examples, splits and metrics. A YAML file in
    `include_path` can run Python code (`!function`): give a folder that you trust. Files that a task reads from outside
    that folder are not part of the stage's key.
    """

    operational: ClassVar[frozenset[str]] = frozenset({"batch_size"})
    """Settings that change no result; not in `identity()`."""

    tasks: tuple[str, ...] = Field(min_length=1)
    """Names of lm-eval's tasks, groups or tags."""
    limit: int | None = Field(default=None, ge=1)
    """Number of samples of each task, the first ones; null takes all."""
    num_fewshot: int | None = Field(default=None, ge=0)
    """Number of examples before each question; null takes the task's own. As in lm-eval, a task that sets 0 keeps 0."""
    include_path: str | None = None
    """Folder with your own YAML tasks, which take precedence over lm-eval's."""
    apply_chat_template: bool = False
    """Whether to apply the chat template; false is lm-eval's default and that of most published numbers."""
    batch_size: int = Field(default=8, ge=1)
    """Number of samples per batch."""

    @field_validator("tasks")
    @classmethod
    def _are_distinct(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        twice = sorted({name for name in value if value.count(name) > 1})
        if twice:
            raise ValueError(f"duplicate: {', '.join(twice)}; name each task once")
        return value

    def identity(self, task: str) -> dict[str, Any]:
        """Return the settings that one task's values depend on."""
        return {**self.model_dump(mode="json", exclude={*self.operational}), "tasks": [task]}


class CurvatureSettings(Record):
    """The amount of data and the precision of a measurement of the loss's curvature."""

    rows: int = Field(default=32, ge=1)
    """Maximum number of rows of each source, drawn at random."""
    iterations: int = Field(default=20, ge=1)
    """Number of products with the Hessian, and of stored copies of the trained weights; each product costs about four
    forward passes over the rows."""
    max_length: int = Field(default=1024, ge=8)
    """Number of tokens at which a row is cut."""
    batch_size: int = Field(default=4, ge=1)
    """Number of rows that are differentiated at once; fewer need less memory."""
    low_memory: bool = False
    """Store 3 copies of the trained weights instead of one per iteration."""
    seed: int = 0
    """Seed of the drawn rows, of a fresh LoRA, and of the first vector."""
