"""Foreign adapter configurations: wrong types, damage and slow patterns end in one error that names the file."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from stayaligned.core.errors import StayalignedError
from stayaligned.hf.models import load_finetuned
from stayaligned.hf.placement.layers import place_adapter
from stayaligned.testing import write_pico_adapter, write_pico_checkpoint
from stayaligned.weights.adapter_config import read_adapter_config
from stayaligned.weights.adapters import Adapter, read_adapter
from stayaligned.weights.checkpoints import open_checkpoint


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made")
    write_pico_adapter(root / "adapter", write_pico_checkpoint(root / "model", num_hidden_layers=1))
    return root


def changed(made: Path, directory: Path, **settings: Any) -> Path:
    """Return a copy of the adapter with other settings."""
    directory.mkdir()
    content = json.loads((made / "adapter" / "adapter_config.json").read_text()) | settings
    (directory / "adapter_config.json").write_text(json.dumps(content))
    (directory / "adapter_model.safetensors").write_bytes((made / "adapter/adapter_model.safetensors").read_bytes())
    return directory


WRONG: list[tuple[str, Any]] = [
    *(("r", value) for value in ("8", None, 0, -4, 8.5, True, [8], {})),
    *(("lora_alpha", value) for value in ("16", None, 0, -1, float("nan"), float("inf"), [16])),
    *(("target_modules", value) for value in ({}, 3, [1], [["q_proj"]], True)),
    *(("exclude_modules", value) for value in ({}, 1)),
    *(("rank_pattern", value) for value in ([], ["q"], {"q": "8"}, {"q": 0}, {"q": None}, "q")),
    *(("alpha_pattern", value) for value in ({"q": float("nan")}, {"q": [1]}, 3)),
    ("layers_to_transform", "all"),
    ("layers_pattern", {"x": 1}),
    ("target_parameters", "experts"),
    ("use_rslora", "yes"),
    ("init_lora_weights", {}),
    ("base_model_name_or_path", ["x"]),
    ("peft_type", None),
    ("peft_type", ["LORA"]),
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_settings_of_a_wrong_type_are_named(made: Path, tmp_path: Path, name: str, value: Any) -> None:
    directory = changed(made, tmp_path / "a", **{name: value})
    for read in (read_adapter, lambda path: load_finetuned(made / "model", path)):
        with pytest.raises(StayalignedError, match=rf"adapter_config\.json: {name}"):
            read(directory)


@pytest.mark.parametrize(
    "text", ["", "[]", '"x"', "\ufeff{}", "[" * 100_000, '{"r": ' + "9" * 5000 + "}", "{'r': 8}", "\0", "null"]
)
def test_a_file_that_is_no_json_object_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(StayalignedError, match=r"adapter_config\.json"):
        read_adapter_config(tmp_path)


SLOW: list[tuple[str, Any]] = [
    *(("rank_pattern", {pattern: 4}) for pattern in ("(a*)*b", "(a|a)*b", "(.*.*)*x", "(x?)*.*(.*)*y", r"(\w+\.?)+!")),
    ("alpha_pattern", {r"(\w+\.?)+!": 4}),
    *((name, r"(\w+\.?)+!") for name in ("target_modules", "exclude_modules", "layers_pattern")),
]


@pytest.mark.parametrize(("setting", "value"), SLOW)
def test_a_pattern_that_takes_for_ever_is_an_error(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str, value: Any
) -> None:
    monkeypatch.setattr("stayaligned.weights.adapter_config._SECONDS", 0.3)
    begin = time.monotonic()
    aligned = open_checkpoint(made / "model")
    adapter = read_adapter(changed(made, tmp_path / "a", **{setting: value}))
    tensors = {**adapter.tensors, f"base_model.model.{'a' * 40}.lora_A.weight": torch.zeros(1)}
    with pytest.raises(StayalignedError, match=f"{setting}: the regular expression .* takes more than"):
        place_adapter(Adapter(adapter.config, tensors, adapter.directory), aligned, aligned)
    assert time.monotonic() - begin < 20


def test_an_invalid_pattern_is_named(made: Path, tmp_path: Path) -> None:
    for number, pattern in enumerate(("(", "*", "a{2,1}", "(?P<x", "[z-a]|(")):
        adapter = read_adapter(changed(made, tmp_path / str(number), target_modules=f"{pattern}+"))
        with pytest.raises(StayalignedError, match="target_modules"):
            place_adapter(adapter, *[open_checkpoint(made / "model")] * 2)


UNSLOTH = (
    r"(?:.*?(?:vision|image|visual|patch|language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)"
    r".*?(?:q_proj|v_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|v_proj)))"
)
LLAMA_FACTORY = r"^(?!.*(?:visual|merger)).*(?:q_proj|v_proj)$"


@pytest.mark.parametrize("pattern", [UNSLOTH, LLAMA_FACTORY, r".*\.(q|v)_proj", r"(\w+\.)*(q|v)_proj"])
def test_patterns_of_other_programs_are_matched(made: Path, tmp_path: Path, pattern: str) -> None:
    aligned = open_checkpoint(made / "model")
    adapter = read_adapter(changed(made, tmp_path / "a", target_modules=pattern, unsloth_fixed=True))
    assert len(place_adapter(adapter, aligned, aligned)) == 2
    load_finetuned(made / "model", tmp_path / "a")


def test_a_setting_that_peft_would_ignore_is_an_error_also_where_peft_loads(made: Path, tmp_path: Path) -> None:
    directory = changed(made, tmp_path / "a", of_a_later_peft=0.5, lorap_emb_lr=1e-6, unsloth_fixed=True)
    with pytest.raises(StayalignedError, match=r"of_a_later_peft=0\.5 is not supported"):
        load_finetuned(made / "model", directory)
    directory = changed(made, tmp_path / "b", of_a_later_peft=False, lorap_emb_lr=1e-6, unsloth_fixed=True)
    load_finetuned(made / "model", directory)


def test_a_rank_that_no_tensor_has_is_refused_before_it_is_allocated(made: Path, tmp_path: Path) -> None:
    for number, settings in enumerate(({"r": 10**7}, {"rank_pattern": {"q_proj": 10**7}})):
        with pytest.raises(StayalignedError, match="states rank 10000000"):
            load_finetuned(made / "model", changed(made, tmp_path / str(number), **settings))
