"""Patching real adapters on real (tiny) checkpoints, against the paper's formula with every matrix formed."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from stayaligned.adapters import read_adapter
from stayaligned.defenses import DEFENSES, ModelPair
from stayaligned.errors import StayalignedError
from stayaligned.patching import patch_directory
from stayaligned.testing import pico_model, write_pico_checkpoint

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

LAYOUTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama q and v, grouped queries": ("llama", {}, {"target_modules": ["q_proj", "v_proj"]}),
    "llama all-linear": ("llama", {}, {"target_modules": "all-linear"}),
    "llama regular expression": ("llama", {}, {"target_modules": r".*\.1\.(self_attn\.q_proj|mlp\.down_proj)"}),
    "llama only layer 1": ("llama", {}, {"target_modules": LINEAR, "layers_to_transform": [1]}),
    "llama rank and alpha patterns": (
        "llama",
        {},
        {"target_modules": LINEAR, "rank_pattern": {"q_proj": 2, "1.mlp.up_proj": 7}, "alpha_pattern": {"v_proj": 3}},
    ),
    "llama rank-stabilised": ("llama", {}, {"target_modules": LINEAR, "use_rslora": True}),
    "llama rank equal to out_features": ("llama", {}, {"target_modules": ["k_proj", "q_proj"], "r": 16}),
    "llama sharded": ("llama", {"shard_size": "20KB"}, {"target_modules": LINEAR}),
    "llama tied lm_head": ("llama", {"tie_word_embeddings": True}, {"target_modules": ["q_proj", "lm_head"]}),
    "qwen2 with biases": ("qwen2", {}, {"target_modules": LINEAR}),
    "mistral": ("mistral", {}, {"target_modules": LINEAR}),
    "gpt2 Conv1D": ("gpt2", {}, {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
}


def make_models(root: Path, architecture: str = "llama", **settings: Any) -> ModelPair:
    for name, seed in (("aligned", 0), ("base", 1)):
        write_pico_checkpoint(root / name, architecture, seed=seed, **settings)
    return ModelPair(root / "aligned", root / "base")


def make_adapter(
    directory: Path, aligned: str | Path, *, adapter_name: str = "default", dtype: Any = torch.float32, **lora: Any
) -> Path:
    """A random adapter on the aligned model, saved by PEFT."""
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_pretrained(aligned, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fan_in_fan_out, tied targets
        peft_model: Any = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8, **lora}), adapter_name)
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.2)
                parameter.data = parameter.data.to(dtype)
        peft_model.save_pretrained(directory)
    return directory if adapter_name == "default" else directory / adapter_name


def deltas(aligned: str | Path, adapter: Path) -> dict[str, torch.Tensor]:
    """{module: the update that PEFT adds to its weight, (out, in), fp64}, from a fresh reload."""
    model = AutoModelForCausalLM.from_pretrained(aligned, dtype=torch.float32)
    before = {name: weight.detach().double().clone() for name, weight in model.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded: Any = PeftModel.from_pretrained(model, adapter)
        targets = {
            name.removeprefix("base_model.model."): module
            for name, module in loaded.named_modules()
            if type(module).__name__ == "Linear" and type(module).__module__.startswith("peft")
        }
        found = {name: module.get_delta_weight("default").detach().double() for name, module in targets.items()}
    assert before
    return {
        name: value.T if type(targets[name].get_base_layer()).__name__ == "Conv1D" else value
        for name, value in found.items()
    }


def directions(models: ModelPair, names: list[str]) -> dict[str, torch.Tensor]:
    """{module: V, (out, in), fp64}, from the models as transformers loads them."""
    aligned, base = (
        AutoModelForCausalLM.from_pretrained(ref, dtype=torch.float32) for ref in (models.aligned, models.base)
    )
    transposed = aligned.config.model_type == "gpt2"
    found: dict[str, torch.Tensor] = {}
    for name in names:
        value = (aligned.get_submodule(name).weight - base.get_submodule(name).weight).detach().double()
        found[name] = value.T if transposed else value
    return found


def dense_scaled_gram(delta: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
    return (delta @ delta.T) / delta.norm() @ update


def dense_orthogonal(delta: torch.Tensor, update: torch.Tensor, rank: int = 3) -> torch.Tensor:
    u = torch.linalg.svd(delta)[0][:, :rank]
    return u @ u.T @ update


def dense_complement(delta: torch.Tensor, update: torch.Tensor, rank: int = 3) -> torch.Tensor:
    u, _, vh = torch.linalg.svd(delta)
    q = vh[:rank].T
    keep_left = torch.eye(delta.shape[0], dtype=delta.dtype) - u[:, :rank] @ u[:, :rank].T
    keep_right = torch.eye(delta.shape[1], dtype=delta.dtype) - q @ q.T
    return keep_left @ update @ keep_right


def cosine(x: torch.Tensor, y: torch.Tensor) -> float:
    return float((x * y).sum() / (x.norm() * y.norm()))


Dense = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
OPERATORS: dict[str, tuple[dict[str, Any], Dense]] = {
    "scaled_gram": ({"name": "safe_lora", "all_layers": True}, dense_scaled_gram),
    "orthogonal": (
        {"name": "safe_lora", "all_layers": True, "operator": "orthogonal", "rank": 3},
        dense_orthogonal,
    ),
    "complement": ({"name": "complement", "rank": 3}, dense_complement),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_factor_form_equals_the_dense_formula_on_every_layout(tmp_path: Path, layout: str) -> None:
    architecture, model_settings, lora = LAYOUTS[layout]
    models = make_models(tmp_path, architecture, **model_settings)
    adapter = make_adapter(tmp_path / "adapter", models.aligned, **lora)
    before = deltas(models.aligned, adapter)
    v = directions(models, list(before))
    for operator, (spec, dense) in OPERATORS.items():
        reports = patch_directory(adapter, tmp_path / operator, DEFENSES.parse(spec), models)
        after = deltas(models.aligned, tmp_path / operator)
        assert before.keys() == after.keys() == {report.module for report in reports}
        for report in reports:
            update = before[report.module]
            expected = dense(v[report.module], update)
            assert (after[report.module] - expected).norm() <= 1e-5 * update.norm(), report.module
            assert report.similarity == pytest.approx(cosine(update, expected), abs=1e-5)
            assert report.shrinkage == pytest.approx(float(expected.norm() / update.norm()), rel=1e-4)
            assert report.update_norm == pytest.approx(float(update.norm()), rel=1e-5)
            assert report.delta_norm == pytest.approx(float(v[report.module].norm()), rel=1e-5)
