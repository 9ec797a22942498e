"""An experiment as a frozen value, from YAML and `key=value`; every error in it at once. Imports no torch."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar, get_args, get_origin

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from stayaligned import testbed
from stayaligned.attacks import ATTACKS, Attack
from stayaligned.core.component import Component, ComponentError, Registry, did_you_mean
from stayaligned.core.errors import StayalignedError
from stayaligned.core.settings import Watch
from stayaligned.data.prompts import PROMPTS, Prompts, parse_prompts
from stayaligned.data.tasks import TASKS, Task
from stayaligned.defenses import DEFENSES, PatchDefense, TrainingDefense
from stayaligned.evaluation.degeneration import Degeneration
from stayaligned.evaluation.judges import JUDGES, Judge
from stayaligned.evaluation.lm_eval import LmEval
from stayaligned.experiments.config.host_settings import Host, setting_names
from stayaligned.experiments.stages.store import input_path, split_options
from stayaligned.hf.generation.generate import Generation


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

# What is set elsewhere; a value in `training:` would break resuming or the stage cache.
_OWN_TRAINING_SETTINGS = {
    "output_dir": "the command's --out",
    "seed": "`seed:`, outside of `training:`",
    "data_seed": "`seed:`, outside of `training:`",
    "resume_from_checkpoint": "rerunning the same command, which resumes by itself",
    "max_length": "`max_length:`, outside of `training:`",
}


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

    def resolved(self, *, progress: testbed.Progress | None = None) -> Experiment:
        """The same experiment with every `testbed:` reference replaced by its path, built if it is not there yet."""
        return Experiment.model_validate(resolve_references(self.spec(), self.seed, progress))


ModelT = TypeVar("ModelT", bound=BaseModel)
ComponentT = TypeVar("ComponentT", bound=Component)


def load_yaml(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The mapping in a YAML file, with dotted `key=value` overrides applied (`defenses.0.rho=2`).

    Raises:
        StayalignedError: if the file is missing or no YAML mapping, or an override has no place.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise StayalignedError(f"{path}: {reason}", hint="Give the path of a YAML file.") from None
    try:
        content = yaml.load(text, Loader=_StrictLoader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        raise StayalignedError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    try:
        json.dumps(content)
    except (ValueError, TypeError, RecursionError) as error:
        raise StayalignedError(f"{path}: not a plain configuration: {error}", hint="Use text and numbers.") from None
    if not isinstance(content, dict):
        raise StayalignedError(f"{path}: expected settings (`key: value`), found {type(content).__name__}")
    apply_overrides(content, overrides)
    return content


def apply_overrides(content: dict[str, Any], overrides: Sequence[str]) -> None:
    """Set each dotted `key=value` in a mapping.

    Raises:
        StayalignedError: if one is none, or has no place.
    """
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise StayalignedError(f"{override!r} is not key=value", hint="For example: training.learning_rate=1e-4")
        set_dotted(content, key, parse_value(value))


def resolve_references(value: Any, seed: int, progress: testbed.Progress | None = None) -> Any:
    """A nested value with each `testbed:` reference replaced by its path in the testbed of `seed`."""
    if isinstance(value, dict):
        return {key: resolve_references(item, seed, progress) for key, item in value.items()}
    if isinstance(value, list):
        return [resolve_references(item, seed, progress) for item in value]
    if isinstance(value, str) and testbed.is_reference(value):
        place, options = split_options(value)
        return f"{testbed.resolve(place, seed, progress=progress)}{options}"
    return value


def parse_value(text: str) -> Any:
    """A command-line value as YAML would read it, except that 1e-4 is a number."""
    try:
        value = yaml.load(text, Loader=_StrictLoader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError:
        return text
    return value


def set_dotted(content: dict[str, Any], key: str, value: Any) -> None:
    """Set `content["a"][0]["b"]` for the key `a.0.b`; mappings that are not there yet are made.

    Raises:
        StayalignedError: if the key leads into something that is no mapping or list.
    """
    *parents, last = key.split(".")
    place: Any = content
    for part in parents:
        if isinstance(place, list) and part.isdigit() and int(part) < len(place):
            if isinstance(place[int(part)], str):
                place[int(part)] = {"name": place[int(part)]}
            place = place[int(part)]
        elif isinstance(place, dict):
            if isinstance(place.get(part), str):
                place[part] = {"name": place[part]}
            elif place.get(part) is None:
                place[part] = {}
            place = place[part]
        else:
            raise StayalignedError(f"{key}: {part!r} leads nowhere", hint="Lists are indexed from 0: defenses.0.rho=2")
    if isinstance(place, list) and last.isdigit() and int(last) <= len(place):
        place[int(last) : int(last) + 1] = [value]
    elif isinstance(place, dict):
        place[last] = value
    else:
        raise StayalignedError(f"{key}: {last!r} leads nowhere", hint="Lists are indexed from 0: defenses.0.rho=2")


def missing_inputs(content: Mapping[str, Any]) -> list[str]:
    """One line for each local file, directory or testbed entry that a configuration names and that is not there."""
    found: list[str] = []
    for place, value in strings_in(content):
        if testbed.is_reference(value):
            try:
                testbed.reference_key(split_options(value)[0], 0)
            except StayalignedError as error:
                found.append(f"{place}: {error.message}. {error.hint}")
        elif _names_missing_input(place, value):
            found.append(
                f"{place}: {split_options(value)[0]} does not exist (paths are relative to the current directory)"
            )
    return found


def parse(model: type[ModelT], content: Mapping[str, Any], where: str, *, check_inputs: bool = True) -> ModelT:
    """Validate a mapping as `model`, and (unless told otherwise) that the files it names are there.

    Raises:
        StayalignedError: with every error in it, each with the path of the field and a suggestion.
    """
    problems: list[str] = []
    value: ModelT | None = None
    try:
        value = model.model_validate(content)
    except ValidationError as error:
        problems += explain(error, model)
    if check_inputs:
        problems += missing_inputs(content)
    if value is None or problems:
        raise_problems(problems, where)
    return value


def parse_component(registry: Registry[ComponentT], spec: Mapping[str, Any], where: str) -> ComponentT:
    """A component from its mapping.

    Raises:
        StayalignedError: with every error in it.
    """
    try:
        return registry.parse(spec)
    except ComponentError as error:
        raise_problems(explain(error.error, error.component), where)
    except ValueError as error:
        raise_problems(str(error).splitlines(), where)


def raise_problems(problems: Sequence[str], where: str) -> NoReturn:
    """Raise one StayalignedError that lists every problem on a line of its own."""
    count = f"{len(problems)} errors" if len(problems) > 1 else "1 error"
    raise StayalignedError(f"{where}: {count}\n" + "\n".join(f"  {problem}" for problem in problems))


def explain(error: ValidationError, model: type[BaseModel], prefix: str = "") -> list[str]:
    """One line per error: the field's path, what is wrong, what was expected."""
    lines: list[str] = []
    for item in error.errors(include_url=False):
        place = prefix + ".".join(str(part) for part in item["loc"])
        cause = item.get("ctx", {}).get("error")
        if isinstance(cause, ComponentError):
            lines += explain(cause.error, cause.component, f"{place}.")
        elif item["type"] == "extra_forbidden":
            known = sorted(_model_at(model, item["loc"][:-1]).model_fields)
            lines.append(f"{place}: no such setting. {did_you_mean(str(item['loc'][-1]), known, 'settings here')}")
        elif isinstance(cause, ValueError):
            label = f"{place.rstrip('.')}: " if place else ""
            # A validator that looks into a mapping names the inner place itself.
            lines += [
                line if place and line.startswith(f"{place}.") else label + line for line in str(cause).splitlines()
            ]
        elif item["type"] == "missing":
            lines.append(f"{place}: required, but not given")
        else:
            lines.append(f"{place}: {item['msg'][0].lower()}{item['msg'][1:]}, found {item['input']!r}")
    return lines


def load_experiment(path: Path, overrides: Sequence[str] = ()) -> Experiment:
    """An experiment from YAML and overrides; every error in it at once, missing input files included.

    Raises:
        StayalignedError: as `load_yaml`, `parse`, or if a named file is not there.
    """
    return parse(Experiment, load_yaml(path, overrides), str(path))


def refuse_unknown_settings(field: str, given: Mapping[str, Any], host: Host) -> None:
    """Refuse, in a validator, what the host does not have or what is set elsewhere.

    Raises:
        ValueError: with a line for each, which names its place.
    """
    problems = list(_unknown_settings(field, given, host))
    if problems:
        raise ValueError("\n".join(problems))


def _unknown_settings(field: str, given: Mapping[str, Any], host: Host) -> Iterator[str]:
    class_name = {"transformers": "TrainingArguments", "sft": "SFTConfig", "lora": "LoraConfig"}[host]
    if field == "training":
        for key in sorted(_OWN_TRAINING_SETTINGS.keys() & given.keys()):
            yield f"training.{key}: set by {_OWN_TRAINING_SETTINGS[key]}; remove it here"
    try:
        known = setting_names(host)
    except StayalignedError as error:
        yield f"{field}: {error.message}. {error.hint}"
        return
    for key in sorted(set(given) - known):
        close = difflib.get_close_matches(key, known, n=1)
        yield f"{field}.{key}: {class_name} has no such setting." + (f" Did you mean {close[0]!r}?" if close else "")


def _model_at(model: type[BaseModel], location: tuple[int | str, ...]) -> type[BaseModel]:
    for part in location:
        if isinstance(part, int) or part not in model.model_fields:
            continue
        annotation = model.model_fields[part].annotation
        options = get_args(annotation) if get_origin(annotation) is not None else (annotation,)
        model = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), model)
    return model


def strings_in(value: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """Every string in a nested value, with its dotted place: `("defenses.0.name", "lisa")`."""
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from strings_in(item, f"{place}.{key}" if place else str(key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from strings_in(item, f"{place}.{index}")


def _names_missing_input(place: str, value: str) -> bool:
    """Whether a setting names a local file that is not there; a hub id is no file until it exists as one."""
    if place == "label" or place.startswith(("training.", "lora.")):
        return False
    path = input_path("", value)
    return path is not None and not path.exists()


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice and reads 1e-4 as a number (YAML 1.1 reads a string)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        # A merge key (`<<: *defaults`) may stand beside keys that it would give, and override nothing.
        named = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        keys = [self.construct_object(key, deep=True) for key in named]
        twice = next((key for index, key in enumerate(keys) if key in keys[:index]), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"key {twice!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep=deep)


# A date is text here: nothing takes one, and JSON has none.
_StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)
