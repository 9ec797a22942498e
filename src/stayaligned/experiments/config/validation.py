"""Validate a configuration, and report every error in it at once."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn, TypeVar, get_args, get_origin

from pydantic import (
    BaseModel,
    ValidationError,
    ValidationInfo,
)

from stayaligned import testbed
from stayaligned.core.component import ComponentError, ComponentT, Registry
from stayaligned.core.errors import StayalignedError, did_you_mean, expectation, nearest
from stayaligned.core.progress import Progress, silent
from stayaligned.core.text import one_line
from stayaligned.experiments.config.host_settings import Host, NotInstalledError, read_setting, setting_types
from stayaligned.experiments.stages.keys import input_path, split_options

# Set elsewhere; a value in `training:` would break resuming or the stage cache.
_OWN_TRAINING_SETTINGS = {
    "output_dir": "the command's --out",
    "seed": "`seed:`, outside of `training:`",
    "data_seed": "`seed:`, outside of `training:`",
    "resume_from_checkpoint": "rerunning the same command, which resumes by itself",
    "max_length": "`max_length:`, outside of `training:`",
}


ModelT = TypeVar("ModelT", bound=BaseModel)
ValueT = TypeVar("ValueT")


def resolve_references(value: ValueT, seed: int, progress: Progress = silent) -> ValueT:
    """Return a nested value with each `testbed:` reference in it replaced by its path.

    Settings, mappings and lists are copied where something in them changes; nothing is validated again.

    Args:
        value: settings, or any part of them.
        seed: seed of the testbed, which is built if it is missing.
        progress: called while the testbed is built.
    """
    return _resolve(value, seed, progress)


def _resolve(value: Any, seed: int, progress: Progress) -> Any:
    if isinstance(value, BaseModel):
        fields = {name: getattr(value, name) for name in type(value).model_fields}
        resolved = {name: _resolve(field, seed, progress) for name, field in fields.items()}
        changed = {name: field for name, field in resolved.items() if field is not fields[name]}
        return value.model_copy(update=changed) if changed else value
    if isinstance(value, dict):
        resolved = {key: _resolve(item, seed, progress) for key, item in value.items()}
        return value if resolved == value else resolved
    if isinstance(value, list | tuple):
        resolved = type(value)(_resolve(item, seed, progress) for item in value)
        return value if resolved == value else resolved
    if isinstance(value, str) and testbed.is_reference(value):
        place, options = split_options(value)
        return f"{testbed.resolve(place, seed, progress=progress)}{options}"
    return value


def missing_inputs(content: Mapping[str, Any]) -> list[str]:
    """Return one line for each file, directory or testbed entry that a configuration names and that is missing."""
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
    """Validate a mapping as `model`, and check that the files that it names exist unless `check_inputs` is False.

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
        # Of a setting with another error, such as an unknown task, it does not matter whether it names a file.
        reported = tuple(f"{problem.partition(': ')[0]}: " for problem in problems)
        problems += [line for line in missing_inputs(content) if not line.startswith(reported)]
    if value is None or problems:
        raise_problems(problems, where)
    return value


def parse_component(registry: Registry[ComponentT], spec: Mapping[str, Any], where: str) -> ComponentT:
    """Validate a component's mapping.

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
    """Raise a StayalignedError that lists each problem on its own line."""
    count = f"{len(problems)} errors" if len(problems) > 1 else "1 error"
    raise StayalignedError(f"{where}: {count}\n" + "\n".join(f"  {problem}" for problem in problems))


def explain(error: ValidationError, model: type[BaseModel], prefix: str = "") -> list[str]:
    """Return one line per error: the field's path, what is wrong, what was expected."""
    lines: list[str] = []
    items = error.errors(include_url=False)
    places = [item["loc"] for item in items]
    for item in items:
        if item["type"] == "too_short" and any(place[:-1] == item["loc"] for place in places):
            continue  # pydantic counts the valid items only; the invalid ones are reported
        place = prefix + ".".join(str(part) for part in item["loc"])
        cause = item.get("ctx", {}).get("error")
        if isinstance(cause, ComponentError):
            lines += explain(cause.error, cause.component, f"{place}.")
        elif item["type"] == "extra_forbidden":
            known = sorted(_model_at(model, item["loc"][:-1]).model_fields)
            lines.append(f"{place}: no such setting. {did_you_mean(str(item['loc'][-1]), known, 'settings here')}")
        elif isinstance(cause, ValueError):
            label = f"{place.rstrip('.')}: " if place else ""
            # A validator of a mapping names the inner field itself.
            lines += [
                line if place and line.startswith(f"{place}.") else label + line for line in str(cause).splitlines()
            ]
        elif item["type"] == "missing":
            lines.append(f"{place}: required, but missing")
        else:
            lines.append(f"{place}: {expectation(item)}, found {_as_yaml(item['input'])}")
    return lines


def _as_yaml(value: object) -> str:
    """Return a value as YAML writes it, on one line."""
    try:
        return one_line(json.dumps(value, ensure_ascii=False), 80)
    except (TypeError, ValueError):
        return one_line(repr(value), 80)


def check_host_settings(value: dict[str, Any] | None, info: ValidationInfo) -> dict[str, Any] | None:
    """Check settings of a host library by name and by type: a validator of two fields.

    Raises:
        ValueError: with a line for each setting that the host does not have, that is set elsewhere, or whose value is
            invalid.
    """
    host: Host = "lora" if info.field_name == "lora" else info.data.get("trainer", "transformers")
    problems: list[str] = []
    read = dict(_read_settings(str(info.field_name), value or {}, host, problems))
    if problems:
        raise ValueError("\n".join(problems))
    return None if value is None else read


def ordered_problems(attack: str, training: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each training setting with which an attack's rows are not learned once and in their order."""
    once = f"the attack {attack} has stages: its rows hold all epochs, and are learned once, in order"
    if training.get("max_steps", -1) > 0:
        yield f"training.max_steps: {once}; remove it, and set `num_train_epochs: 1`"
    elif training.get("num_train_epochs") != 1:
        yield f"training.num_train_epochs: {once}; set it to 1"
    if training.get("train_sampling_strategy", "sequential") != "sequential":
        yield f"training.train_sampling_strategy: {once}; remove it"
    if training.get("packing"):
        yield f"training.packing: {once}, and packing reorders them; remove it"


def _read_settings(field: str, given: Mapping[str, Any], host: Host, problems: list[str]) -> Iterator[tuple[str, Any]]:
    """Yield each setting with its value; append a line to `problems` for each invalid one."""
    class_name = {"transformers": "TrainingArguments", "sft": "SFTConfig", "lora": "LoraConfig"}[host]
    try:
        known = setting_types(host)
    except NotInstalledError:  # whoever uses the settings says so; see `config.packages`
        yield from given.items()
        return
    for key, value in given.items():
        if field == "training" and key in _OWN_TRAINING_SETTINGS:
            problems.append(f"training.{key}: set by {_OWN_TRAINING_SETTINGS[key]}; remove it here")
        elif key not in known:
            problems.append(f"{field}.{key}: {class_name} has no such setting. {nearest(key, known)}".rstrip())
        else:
            try:
                yield key, read_setting(host, key, value)
            except ValueError as error:
                problems.append(f"{field}.{key}: {error}")
    epochs, steps = given.get("num_train_epochs"), given.get("max_steps")
    by_epochs = field == "training" and not (isinstance(steps, int) and steps > 0)
    if by_epochs and isinstance(epochs, int | float) and epochs <= 0:
        problems.append(f"training.num_train_epochs: {epochs:g} trains nothing")


def _model_at(model: type[BaseModel], location: tuple[int | str, ...]) -> type[BaseModel]:
    for part in location:
        if isinstance(part, int) or part not in model.model_fields:
            continue
        annotation = model.model_fields[part].annotation
        options = get_args(annotation) if get_origin(annotation) is not None else (annotation,)
        model = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), model)
    return model


def strings_in(value: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """Yield every string in a nested value, with its dotted place: `("defenses.0.name", "lisa")`."""
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from strings_in(item, f"{place}.{key}" if place else str(key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from strings_in(item, f"{place}.{index}")


def _names_missing_input(place: str, value: str) -> bool:
    """Return whether a setting names a missing local file; a hub id counts as a file only if it exists as one."""
    if place == "label" or place.startswith(("training.", "lora.")):
        return False
    path = input_path("", value)
    return path is not None and not path.exists()
