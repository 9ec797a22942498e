"""The settings of an experiment, validated with every error at once. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    field_validator,
    model_validator,
)

from stayaligned.attacks import ATTACKS, Attack
from stayaligned.core.component import Component, Registry
from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import HARM_SETS, PromptSet
from stayaligned.core.settings import ChatTemplate, Generation, LmEval, TrainerKind, Watch
from stayaligned.data.prompts import PROMPTS, Prompts, parse_prompts
from stayaligned.data.tasks import TASKS, Task
from stayaligned.defenses import DEFENSES, PatchDefense, TrainingDefense
from stayaligned.evaluation.degeneration import Degeneration
from stayaligned.evaluation.judges import JUDGES, Judge
from stayaligned.experiments.config.validation import check_host_settings, ordered_problems, parse
from stayaligned.experiments.config.yaml_file import load_yaml


def _named(registry: Registry[Any]) -> tuple[BeforeValidator, PlainSerializer]:
    return BeforeValidator(registry.parse), PlainSerializer(Component.spec)


REGISTRIES: list[Registry[Any]] = [TASKS, ATTACKS, DEFENSES, PROMPTS, JUDGES]
"""The registries of all kinds of components."""

TaskField = Annotated[Task, *_named(TASKS)]
AttackField = Annotated[Attack, *_named(ATTACKS)]
JudgeField = Annotated[Judge, *_named(JUDGES)]
DefenseField = Annotated[TrainingDefense | PatchDefense, *_named(DEFENSES)]
PromptsField = Annotated[
    str | Prompts | None,
    BeforeValidator(parse_prompts),
    PlainSerializer(lambda value: value.spec() if isinstance(value, Prompts) else value),
]
"""A source of prompts, or a prompt set by its name or its mapping."""


class Experiment(BaseModel):
    """One arm of a comparison: a model, its fine-tuning data, its defenses and its evaluation.

    Data is named by a JSONL file (`path.jsonl`) or a hub data set (`hf://owner/name?split=train`); a model by a
    directory or a hub id. `testbed:…` names a file of the embedded testbed with the experiment's seed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    label: str = ""
    """Name of the arm in tables; it changes nothing that is computed."""
    model: str
    """The aligned model: a checkpoint directory or a hub id."""
    base_model: str | None = None
    """The unaligned ancestor of the aligned model, for defenses that compare the two."""
    allow_mismatch: bool = False
    """Patch although model, base model and adapter don't seem to belong together; the result notes it."""
    adapter: str | None = None
    """A finished PEFT adapter to patch and evaluate, instead of training one."""
    chat_template: ChatTemplate = ChatTemplate()
    """How conversations are rendered: arguments of the chat template (`enable_thinking`) and the date that it writes;
    a path alone is a Jinja file with the template."""
    other_template: bool = False
    """Evaluate a fine-tuned model even if its files name another chat template than the model's tokenizer has."""
    task: TaskField | None = None
    """Task to fine-tune for; `finetune_accuracy` is measured on its test split."""
    attack: AttackField | None = None
    """Attack on the training rows of the task."""
    alignment_data: str | None = None
    """Requests with safe completions, for defenses that train on them."""
    defenses: tuple[DefenseField, ...] = ()
    """At most one training defense (plain fine-tuning if none), then patches, which are applied in this order."""
    lora: dict[str, Any] | None = Field(default_factory=dict)
    """Fields of PEFT's LoraConfig; null trains the full weights."""
    trainer: TrainerKind = "transformers"
    """Trainer class: transformers' Trainer, or TRL's SFTTrainer."""
    training: dict[str, Any] | None = Field(default_factory=dict)
    """Fields of TrainingArguments (of SFTConfig for `trainer: sft`); null evaluates without training."""
    max_length: int = Field(default=1024, ge=8)
    """Tokens to which a training row is cut."""
    watch: Watch | None = None
    """Safety probes during training, and the action to take when they worsen."""
    harmful_prompts: PromptsField = None
    """Harmful prompts, for the harmful score: a prompt set (`beavertails`) or a source."""
    shaped_prompts: bool = False
    """Also measure harm on the harmful prompts in the shape of the task's clean training rows (`shaped`)."""
    benign_prompts: PromptsField = None
    """Benign prompts that look harmful, for over-refusal: a prompt set (`xstest`) or a source."""
    skills: TaskField | None = None
    """Task that the aligned model can do already; `skills_kept` is measured on its test split."""
    lm_eval: LmEval | None = None
    """Tasks of the lm-evaluation-harness to run on the final model."""
    limit: int | None = Field(default=None, ge=1)
    """Maximum number of prompts per prompt set; the first ones are used."""
    judges: tuple[JudgeField, ...] = Field(default=("keyword",), min_length=1)  # pyright: ignore[reportAssignmentType]
    """Judges of the completions; the first one is the primary judge, whose rates are in the main table."""
    generation: Generation = Generation()
    """How completions are generated."""
    max_unscored: float = Field(default=0.1, ge=0, le=1)
    """Largest share of unscored verdicts per judge; a larger share fails the run."""
    degeneration: Degeneration | None = Degeneration()
    """Limits beyond which a completion counts as degenerate; null skips the check."""
    seed: int = Field(default=0, ge=0)
    """Seed of the training, the attack and the testbed."""

    @property
    def training_defense(self) -> TrainingDefense:
        """The training defense; plain fine-tuning if none is named."""
        chosen = next((d for d in self.defenses if isinstance(d, TrainingDefense)), None)
        return chosen if chosen is not None else DEFENSES.parse("sft")

    @property
    def patches(self) -> tuple[PatchDefense, ...]:
        """The patches, in the order in which they are applied."""
        return tuple(d for d in self.defenses if isinstance(d, PatchDefense))

    @property
    def trains(self) -> bool:
        """Whether the experiment fine-tunes, rather than only evaluates."""
        return self.training is not None and self.adapter is None

    @property
    def harm_sets(self) -> tuple[PromptSet, ...]:
        """The prompt sets that measure harm in this experiment."""
        if self.harmful_prompts is None:
            return ()
        asked = {
            "harmful": True,
            "triggered": self.attack is not None and self.attack.has_trigger,
            "shaped": self.shaped_prompts,
            "sampled": self.generation.samples > 0,
        }
        return tuple(name for name in HARM_SETS if asked[name])

    @property
    def arm(self) -> str:
        """Name of the arm: the label, or else the names of the defenses."""
        names = "+".join(d.name for d in self.defenses)
        return self.label or names or ("sft" if self.trains else "untouched")

    def spec(self) -> dict[str, Any]:
        """Return the plain mapping that validates to an equal experiment, defaults included."""
        return self.model_dump(mode="json")

    _check_host_settings = field_validator("lora", "training")(check_host_settings)

    @model_validator(mode="after")
    def _fits_together(self) -> Experiment:
        problems = list(self._problems())
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _problems(self) -> Iterator[str]:
        if len(set(self.judges)) < len(self.judges):
            yield "judges: the same judge appears twice, with the same settings; name it once"
        trainers = [d.name for d in self.defenses if isinstance(d, TrainingDefense)]
        if len(trainers) > 1:
            yield f"defenses: {' and '.join(trainers)} both train; name one"
        if self.trains and (self.training or {}).get("max_steps") == 0:
            yield "training.max_steps: 0 trains nothing; set `training: null` to evaluate only"
        if self.trains and self.attack is not None and self.attack.ordered:
            yield from ordered_problems(self.attack.name, self.training or {})
        if self.trains and (steps := (self.training or {}).get("max_steps", -1)) > 0:
            try:
                self.training_defense.check_steps(steps)
            except StayalignedError as error:
                yield f"defenses: {error.message}. {error.hint}"
        if self.trains and self.task is None:
            yield "task: training needs a task with training rows (or set `training: null` to evaluate only)"
        if trainers and not self.trains:
            yield f"defenses: {trainers[0]} trains, but this experiment does not (`training: null` or `adapter:`)"
        if self.training_defense.needs_alignment_data and trainers and self.alignment_data is None:
            yield f"alignment_data: {trainers[0]} needs safety data: a JSONL file of requests with safe completions"
        if self.training_defense.needs_base and trainers and self.base_model is None:
            yield f"base_model: {trainers[0]} compares the model with its unaligned ancestor; name it"
        for patch in self.patches:
            if not self.trains and self.adapter is None:
                yield f"defenses: {patch.name} patches a fine-tuned model, but none is trained or given as `adapter:`"
            if self.lora is None and self.adapter is None and not patch.patches_full_weights:
                yield f"defenses: {patch.name} patches LoRA adapters, but `lora: null` trains the full weights"
            if (self.lora is not None or self.adapter is not None) and not patch.patches_adapters:
                yield f"defenses: {patch.name} patches full weights, not adapters: train them with `lora: null`"
            if patch.needs_base and self.base_model is None:
                yield f"base_model: {patch.name} compares the model with its unaligned ancestor; name it"
            if patch.needs_alignment_data and self.alignment_data is None:
                yield f"alignment_data: {patch.name} needs safety data: a JSONL file of requests with safe completions"
        if self.generation.backend == "endpoint" and (self.trains or self.adapter or self.patches or self.lm_eval):
            yield (
                "generation.backend: a server generates with its own model, which can't be trained, patched or "
                "measured by `lm_eval` here (set `training: null`, and let the server load the adapter)"
            )
        if self.generation.backend == "endpoint" and self.chat_template.file is not None:
            yield (
                "chat_template.file: a server renders with its own template; give it the file when it starts (vLLM: "
                "--chat-template, llama.cpp: --chat-template-file), and remove this setting"
            )
        if self.generation.backend == "endpoint" and self.chat_template.date != ChatTemplate().date:
            yield (
                "chat_template.date: a server writes its own date; if its template reads the date from an argument, "
                "set that one (chat_template.arguments.date_string for Llama 3)"
            )
        if self.trains and self.attack is not None:
            yield from (f"attack: {text}" for text in self.attack.missing())
        if self.shaped_prompts and self.task is None:
            yield "shaped_prompts: the shape is that of the task's training rows; name a `task`"
        for name, wanted in (("shaped_prompts", self.shaped_prompts), ("generation.samples", self.generation.samples)):
            if wanted and self.harmful_prompts is None:
                yield f"{name}: asks the harmful prompts; name `harmful_prompts`"
        if self.watch is not None and not self.trains:
            yield "watch: measures while a model trains, but this experiment trains none"
        if not (self.task or self.harmful_prompts or self.benign_prompts or self.skills or self.lm_eval):
            yield "nothing to measure: name a `task`, `harmful_prompts`, `benign_prompts`, `skills` or `lm_eval`"


def load_experiment(path: Path, overrides: Sequence[str] = ()) -> Experiment:
    """Load an experiment from YAML and overrides; every error is reported at once, missing input files included.

    Raises:
        StayalignedError: as `load_yaml` and `parse`.
    """
    content = load_yaml(path, overrides)
    if {"base", "axes"} <= content.keys():
        raise StayalignedError(f"{path}: a grid, expected one experiment", hint="Use `stayaligned bench`.")
    return parse(Experiment, content, str(path))
