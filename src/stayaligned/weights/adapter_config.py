"""Read `adapter_config.json`: types are checked, and patterns that may not end are refused."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stayaligned.core.errors import StayalignedError, first_problem
from stayaligned.core.text import one_line
from stayaligned.weights.checkpoints import read_json_object
from stayaligned.weights.directories import ADAPTER_CONFIG, refuse_mlx

_REPEATS_OR_CHOICES = re.compile(r"[*+?{|]")
"""What a regular expression must have to be slow."""
_SECONDS = 10
"""Time to match all module names, which takes milliseconds."""
_TRY = """
import json, re, sys
patterns, names = json.load(sys.stdin)
for pattern in patterns:
    for name in names:
        re.fullmatch(pattern, name)
        re.match(rf"(.*\\.)?({pattern})$", name)
        re.match(rf".*\\.{pattern}\\.(\\d+)\\.", name)
"""
"""Program that matches patterns as PEFT does: whole names, the ends of names, and layers."""
_Rank = Annotated[int, Field(gt=0)]
_Alpha = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _LoraSettings(BaseModel):
    """Types of the settings that place and scale a LoRA."""

    model_config = ConfigDict(strict=True, extra="allow")

    r: _Rank = 8
    lora_alpha: _Alpha = 8
    target_modules: str | list[str] | None = None
    exclude_modules: str | list[str] | None = None
    target_parameters: list[str] | None = None
    rank_pattern: dict[str, _Rank] | None = None
    alpha_pattern: dict[str, _Alpha] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    use_rslora: bool | None = None
    use_dora: bool | None = None
    fan_in_fan_out: bool | None = None
    bias: str = "none"
    init_lora_weights: bool | str = True
    base_model_name_or_path: str | None = None
    modules_to_save: list[str] | str | None = None


def read_adapter_config(directory: Path) -> dict[str, Any]:
    """Return the content of an adapter's `adapter_config.json`; the settings of a LoRA have their types.

    Raises:
        StayalignedError: if it is damaged, of another program, or has a setting of a wrong type.
    """
    path = directory / ADAPTER_CONFIG
    config = read_json_object(path, hint="Save or download the adapter again.")
    if "peft_type" not in config and config.keys() & {"fine_tune_type", "lora_parameters", "lora_layers", "num_layers"}:
        refuse_mlx(directory)
    if not isinstance(config.get("peft_type"), str):
        raise StayalignedError(
            f"{path}: peft_type is {one_line(repr(config.get('peft_type')))}, expected a name such as 'LORA'",
            hint="Give the directory that `save_pretrained` of a PEFT model wrote.",
        )
    if config["peft_type"] == "LORA":
        try:
            _LoraSettings.model_validate(config)
        except ValidationError as error:
            raise StayalignedError(
                f"{path}: {one_line(first_problem(error))}", hint="Save the adapter again with PEFT."
            ) from None
    return config


def refuse_slow_patterns(adapter: Path, config: Mapping[str, Any], names: Collection[str]) -> None:
    """Raise if matching a regular expression of the configuration with the names of modules may not end.

    The time may grow exponentially with the length of a name, and Python's matcher can't be interrupted, so another
    process tries it first. Configurations that only list names, as most do, cost nothing.

    Args:
        adapter: the adapter's directory, for the message.
        config: its configuration.
        names: names of the modules that will be matched.
    """
    risky = {pattern: name for name, pattern in _patterns(config) if _REPEATS_OR_CHOICES.search(pattern)}
    if not risky:
        return
    for pattern, name in risky.items():
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise _bad_pattern(adapter, name, pattern, f"is invalid: {error}") from None
    tried = json.dumps([[*risky], [*names]])
    try:
        command = [sys.executable, "-I", "-S", "-c", _TRY]
        subprocess.run(command, input=tried, text=True, capture_output=True, check=False, timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        pattern, name = next(iter(risky.items()))
        where = name if len(risky) == 1 else ", ".join(dict.fromkeys(risky.values()))
        raise _bad_pattern(adapter, where, pattern, f"takes more than {_SECONDS} s to match module names") from None


def _patterns(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (setting, regular expression as PEFT matches it) of a LoRA's configuration."""
    for name in ("target_modules", "exclude_modules"):
        if isinstance(config.get(name), str):
            yield name, config[name]
    layers = config.get("layers_pattern") or ()
    for pattern in [layers] if isinstance(layers, str) else layers:
        yield "layers_pattern", pattern
    for name in ("rank_pattern", "alpha_pattern"):
        for pattern in config.get(name) or ():
            yield name, pattern


def _bad_pattern(adapter: Path, name: str, pattern: str, problem: str) -> StayalignedError:
    return StayalignedError(
        f"{adapter / ADAPTER_CONFIG}: {name}: the regular expression {one_line(repr(pattern))} {problem}",
        hint="List the names of the modules instead, or use fewer `*` and `+`, none of them inside another.",
    )
