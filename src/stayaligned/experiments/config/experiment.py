"""An experiment as a frozen value, from YAML and `key=value`; every error in it at once. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationInfo,
    field_validator,
    model_validator,
)

from stayaligned.attacks import ATTACKS, Attack
from stayaligned.core.component import Component, Registry
from stayaligned.core.settings import Generation, LmEval, Watch
from stayaligned.data.prompts import PROMPTS, Prompts, parse_prompts
from stayaligned.data.tasks import TASKS, Task
from stayaligned.defenses import DEFENSES, PatchDefense, TrainingDefense
from stayaligned.evaluation.degeneration import Degeneration
from stayaligned.evaluation.judges import JUDGES, Judge
from stayaligned.experiments.config.host_settings import Host
from stayaligned.experiments.config.validation import parse, refuse_unknown_settings
from stayaligned.experiments.config.yaml_file import load_yaml


def _named(registry: Registry[Any]) -> tuple[BeforeValidator, PlainSerializer]:
    return BeforeValidator(registry.parse), PlainSerializer(Component.spec)


REGISTRIES: list[Registry[Any]] = [TASKS, ATTACKS, DEFENSES, PROMPTS, JUDGES]
"""The registries of the five nouns."""

TaskField = Annotated[Task, *_named(TASKS)]
AttackField = Annotated[Attack, *_named(ATTACKS)]
JudgeField = Annotated[Judge, *_named(JUDGES)]
DefenseField = Annotated[TrainingDefense | PatchDefense, *_named(DEFENSES)]
PromptsField = Annotated[
    str | Prompts | None,
    BeforeValidator(parse_prompts),
    PlainSerializer(lambda value: value.spec() if isinstance(value, Prompts) else value),
]
"""A source, or a prompt set by its name or mapping."""


class Experiment(BaseModel):
    """One arm of a comparison: a model, what it is fine-tuned on, how it is defended, how it is judged.

    Strings that name data are JSONL files (`path.jsonl`) or hub data sets (`hf://owner/name?split=train`); models
    are directories or hub ids. `testbed:…` names a file of the embedded testbed of this experiment's seed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    label: str = ""
    """The name of this arm in tables; not part of what the experiment is."""
    model: str
    """The aligned model: a checkpoint directory or a hub id."""
    base_model: str | None = None
    """Its unaligned ancestor, for defenses that compare the two."""
    adapter: str | None = None
    """A finished PEFT adapter to patch and judge, instead of training one."""
    other_template: bool = False
    """Ask a fine-tune although its files name another chat template than the model's tokenizer has."""
    task: TaskField | None = None
    """What the user fine-tunes for; `finetune_accuracy` is measured on its test split."""
    attack: AttackField | None = None
    """What an attacker does to the task's rows."""
    alignment_data: str | None = None
    """Safety data, for defenses that train on some."""
    defenses: tuple[DefenseField, ...] = ()
    """At most one that trains (plain fine-tuning if none), then patches, applied in this order."""
    lora: dict[str, Any] | None = Field(default_factory=dict)
    """Fields of PEFT's LoraConfig; null trains the full weights."""
    trainer: Literal["transformers", "sft"] = "transformers"
    """transformers' Trainer, or TRL's SFTTrainer."""
    training: dict[str, Any] | None = Field(default_factory=dict)
    """Fields of TrainingArguments (of SFTConfig for `trainer: sft`); null evaluates without training."""
    max_length: int = Field(default=1024, ge=8)
    """Tokens after which a training row is cut."""
    watch: Watch | None = None
    """What is measured of the model's safety while it trains, and what is done when it worsens."""
    harmful_prompts: PromptsField = None
    """Requests that an aligned model refuses: harmful score. A prompt set (`beavertails`) or a source."""
    benign_prompts: PromptsField = None
    """Harmless look-alikes that it should answer: over-refusal. A prompt set (`xstest`) or a source."""
    skills: TaskField | None = None
    """What the model could do before; `skills_kept` is measured on its test split."""
    lm_eval: LmEval | None = None
    """Tasks of the lm-evaluation-harness that the final model is measured on."""
    limit: int | None = Field(default=None, ge=1)
    """At most so many prompts a set."""
    judges: tuple[JudgeField, ...] = Field(default=("keyword",), min_length=1)  # pyright: ignore[reportAssignmentType]
    """The first is the primary one, whose rates stand in the main table."""
    generation: Generation = Generation()
    max_unscored: float = Field(default=0.1, ge=0, le=1)
    """A share of unscored verdicts above this fails the run: its rates would say little."""
    degeneration: Degeneration | None = Degeneration()
    """When an answer, to any prompt, counts as no language; null does not look."""
    seed: int = Field(default=0, ge=0)
    """Seed of the training, the attack and the testbed."""

    @property
    def training_defense(self) -> TrainingDefense:
        """The defense that trains; plain fine-tuning if none is named."""
        chosen = next((d for d in self.defenses if isinstance(d, TrainingDefense)), None)
        return chosen if chosen is not None else DEFENSES.parse("sft")

    @property
    def patches(self) -> tuple[PatchDefense, ...]:
        """The patches, in order."""
        return tuple(d for d in self.defenses if isinstance(d, PatchDefense))

    @property
    def trains(self) -> bool:
        """Whether this experiment fine-tunes, rather than evaluates what there is."""
        return self.training is not None and self.adapter is None

    @property
    def arm(self) -> str:
        """The row's name: the label, or one made from the defenses."""
        names = "+".join(d.name for d in self.defenses)
        return self.label or names or ("sft" if self.trains else "untouched")

    def spec(self) -> dict[str, Any]:
        """The plain mapping that makes an equal experiment; defaults included."""
        return self.model_dump(mode="json")

    @field_validator("lora", "training")
    @classmethod
    def _host_knows_every_setting(cls, value: dict[str, Any] | None, info: ValidationInfo) -> dict[str, Any] | None:
        host: Host = "lora" if info.field_name == "lora" else info.data.get("trainer", "transformers")
        refuse_unknown_settings(str(info.field_name), value or {}, host)
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Experiment:
        problems = list(self._problems())
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _problems(self) -> Iterator[str]:
        if len(set(self.judges)) < len(self.judges):
            yield "judges: the same judge stands there twice, with the same settings"
        trainers = [d.name for d in self.defenses if isinstance(d, TrainingDefense)]
        if len(trainers) > 1:
            yield f"defenses: {' and '.join(trainers)} both train; name one"
        if self.trains and self.task is None:
            yield "task: training needs a task with training rows (or set `training: null` to evaluate only)"
        if trainers and not self.trains:
            yield f"defenses: {trainers[0]} trains, but this experiment does not (`training: null` or `adapter:`)"
        if self.training_defense.needs_alignment_data and trainers and self.alignment_data is None:
            yield f"alignment_data: {trainers[0]} needs safety data; name a JSONL file of requests and safe answers"
        for patch in self.patches:
            if not self.trains and self.adapter is None:
                yield f"defenses: {patch.name} patches a fine-tune, but nothing is trained or given as `adapter:`"
            if self.lora is None and self.adapter is None and not patch.patches_full_weights:
                yield f"defenses: {patch.name} patches LoRA adapters, but `lora: null` trains the full weights"
            if patch.needs_base and self.base_model is None:
                yield f"base_model: {patch.name} compares the model with its unaligned ancestor; name it"
        if self.generation.backend == "endpoint" and (self.trains or self.adapter or self.patches or self.lm_eval):
            yield (
                "generation.backend: a server answers with its own model: nothing can be trained, patched or measured "
                "by `lm_eval` here (set `training: null`, and let the server load the adapter)"
            )
        if self.watch is not None and not self.trains:
            yield "watch: measures while a model trains, but this experiment trains none"
        if not (self.task or self.harmful_prompts or self.benign_prompts or self.skills or self.lm_eval):
            yield "nothing to measure: name a `task`, `harmful_prompts`, `benign_prompts`, `skills` or `lm_eval`"


def load_experiment(path: Path, overrides: Sequence[str] = ()) -> Experiment:
    """An experiment from YAML and overrides; every error in it at once, missing input files included.

    Raises:
        StayalignedError: as `load_yaml`, `parse`, or if a named file is not there.
    """
    return parse(Experiment, load_yaml(path, overrides), str(path))
