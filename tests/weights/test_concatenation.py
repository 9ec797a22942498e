"""Joined adapters, compared with PEFT's own concatenation and with the sum of the dense updates."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from stayaligned.algorithms.safe_lora import LoraFactors
from stayaligned.core.errors import StayalignedError
from stayaligned.testing import write_pico_adapter, write_pico_checkpoint
from stayaligned.weights.adapters import read_adapter, write_adapter
from stayaligned.weights.concatenation import concatenate, layers_by_module

FIRST: dict[str, dict[str, Any]] = {
    "one scaling": {"target_modules": ["q_proj", "v_proj"]},
    "rank-stabilised": {"target_modules": "all-linear", "use_rslora": True, "r": 3},
    "patterns": {
        "target_modules": ["q_proj", "up_proj"],
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"0.mlp.up_proj": 5},
    },
    "bf16": {"target_modules": ["q_proj", "v_proj"], "dtype": "bfloat16"},
    "only layer 1": {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pico_checkpoint(tmp_path_factory.mktemp("model") / "m", "llama", seed=0)


def loaded(model: Path, *adapters: Path) -> Any:
    found: Any = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), adapters[0], "a0"
    )
    for index, adapter in enumerate(adapters[1:], 1):
        found.load_adapter(adapter, f"a{index}")
    return found


def updates(peft_model: Any, name: str) -> dict[str, torch.Tensor]:
    return {
        module.removeprefix("base_model.model."): layer.get_delta_weight(name).detach().double()
        for module, layer in peft_model.named_modules()
        if name in getattr(layer, "lora_A", {})
    }


@pytest.mark.parametrize("kind", FIRST)
@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "o_proj"]], ids=["own layers", "other layers too"])
def test_the_joined_adapter_loads_in_peft_and_adds_both_updates(
    model: Path, tmp_path: Path, kind: str, targets: list[str]
) -> None:
    first = write_pico_adapter(tmp_path / "first", model, **FIRST[kind])
    second = write_pico_adapter(tmp_path / "second", model, seed=1, r=3, lora_alpha=5, target_modules=targets)
    adapter, other = read_adapter(first), read_adapter(second)
    further = {name: other.factors(layer) for name, layer in layers_by_module(other).items()}
    joined = concatenate(adapter, further)
    (tmp_path / "joined").mkdir()
    write_adapter(joined, tmp_path / "joined")
    both = loaded(model, first, second, tmp_path / "joined")
    one, two, three = (updates(both, f"a{i}") for i in range(3))
    assert three.keys() == one.keys() | two.keys()
    off = 2.0**-8 if kind == "bf16" else 1e-6
    for name, value in three.items():
        expected = one.get(name, torch.zeros(()).double()) + two.get(name, torch.zeros(()).double())
        assert (value - expected).norm() <= off * expected.norm(), name
    for name, layer in layers_by_module(adapter).items():  # the adapter's own factors keep their bits
        after = joined.tensors[layer.a_key]
        assert after.dtype == adapter.tensors[layer.a_key].dtype
        assert after[: layer.rank].equal(adapter.tensors[layer.a_key]), name
        assert joined.tensors[layer.b_key][:, : layer.rank].equal(adapter.tensors[layer.b_key])
    assert bool(joined.config["rank_pattern"]) == (kind == "patterns")


def test_the_joined_adapter_equals_peft_s_own_concatenation(model: Path, tmp_path: Path) -> None:
    first = write_pico_adapter(tmp_path / "first", model)
    second = write_pico_adapter(tmp_path / "second", model, seed=1, r=3)
    other = read_adapter(second)
    further = {name: other.factors(layer) for name, layer in layers_by_module(other).items()}
    further = {name: value._replace(scaling=0.5 * value.scaling) for name, value in further.items()}
    (tmp_path / "joined").mkdir()
    write_adapter(concatenate(read_adapter(first), further), tmp_path / "joined")
    both = loaded(model, first, second, tmp_path / "joined")
    both.add_weighted_adapter(["a0", "a1"], [1.0, 0.5], "cat", combination_type="cat")
    theirs, ours = updates(both, "cat"), updates(both, "a2")
    assert all((theirs[name] - ours[name]).abs().max() < 1e-6 for name in theirs)
    assert both.peft_config["a2"].r == both.peft_config["cat"].r == 7


def test_small_factors_of_fp16_keep_their_bits_beside_further_ones(model: Path, tmp_path: Path) -> None:
    adapter = read_adapter(write_pico_adapter(tmp_path / "first", model, dtype="float16"))
    name, layer = next(iter(layers_by_module(adapter).items()))
    small = {**adapter.tensors, layer.b_key: adapter.tensors[layer.b_key] * 2.0**-10}
    adapter = replace(adapter, tensors=small)
    added = LoraFactors(torch.ones(1, layer.in_features), torch.full((layer.out_features, 1), 2.0**-12), 1.0)
    joined = concatenate(adapter, {name: added})
    assert joined.tensors[layer.a_key][: layer.rank].equal(small[layer.a_key])
    assert joined.tensors[layer.b_key][:, : layer.rank].equal(small[layer.b_key])


def test_what_can_t_be_joined_is_refused_by_name(model: Path, tmp_path: Path) -> None:
    adapter = read_adapter(write_pico_adapter(tmp_path / "first", model))
    name = "model.layers.0.self_attn.q_proj"
    size = layers_by_module(adapter)[name].in_features
    for a, b in (
        (torch.ones(2, size + 1), torch.ones(16, 2)),
        (torch.ones(2, size), torch.ones(16, 3)),
        (torch.full((2, size), math.nan), torch.ones(16, 2)),
    ):
        with pytest.raises(StayalignedError, match=name):
            concatenate(adapter, {name: LoraFactors(a, b, 1.0)})
    for index, (setting, found) in enumerate(
        {"use_dora": (True, "use_dora"), "lora_bias": (True, "lora_bias"), "r": (5, "one A and one B")}.items()
    ):
        place = shutil.copytree(tmp_path / "first", tmp_path / f"changed{index}")
        config = json.loads((place / "adapter_config.json").read_text())
        (place / "adapter_config.json").write_text(json.dumps({**config, setting: found[0]}))
        with pytest.raises(StayalignedError, match=found[1]):
            concatenate(read_adapter(place), {})
    embeddings = write_pico_adapter(tmp_path / "embeddings", model, target_modules=["embed_tokens", "q_proj"])
    with pytest.raises(StayalignedError, match="one A and one B"):
        concatenate(read_adapter(embeddings), {})
