"""Placed layers, compared with PEFT's layers; adapters that can't be patched exactly are refused by name."""

import json
import shutil
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from stayaligned.core.errors import StayalignedError
from stayaligned.hf.placement.stored import meta_model
from stayaligned.testing import pico_model, write_pico_adapter, write_pico_checkpoint
from stayaligned.weights.adapters import Adapter, read_adapter
from stayaligned.weights.checkpoints import Checkpoint, open_checkpoint
from stayaligned.weights.lora_layout import is_targeted, pattern_value
from stayaligned.weights.unsupported import note_on_whole, refuse_unsupported
from support.checkpoints import lora_layers


@pytest.fixture(scope="module")
def aligned(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(write_pico_checkpoint(tmp_path_factory.mktemp("layers") / "aligned"))


@pytest.fixture(scope="module")
def adapter(aligned: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    return read_adapter(write_pico_adapter(tmp_path_factory.mktemp("layers") / "adapter", aligned.directory))


def with_config(adapter: Adapter, **changes: Any) -> Adapter:
    return Adapter(MappingProxyType({**adapter.config, **changes}), adapter.tensors, adapter.directory)


def with_tensors(adapter: Adapter, tensors: dict[str, Any]) -> Adapter:
    return Adapter(adapter.config, MappingProxyType(tensors), adapter.directory)


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"use_dora": True}, "use_dora=True", "merge_and_unload"),
    ({"lora_bias": True}, "lora_bias=True", "lora_bias=False"),
    ({"bias": "lora_only"}, "bias='lora_only'", 'bias="none"'),
    ({"bias": "all"}, "bias='all'", 'bias="none"'),
    ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication", "layer_replication"),
    ({"alora_invocation_tokens": [3]}, "alora_invocation_tokens", "Train without it"),
    ({"use_qalora": True}, "use_qalora", "Train without it"),
    ({"megatron_config": {"x": 1}}, "megatron_config", "Train without it"),
    ({"arrow_config": {"top_k": 1}}, "arrow_config", "Train without it"),
    ({"kasa_config": {"x": 1}}, "kasa_config", "Train without it"),
    ({"velora_config": {"x": 1}}, "velora_config", "Train without it"),
    ({"monteclora_config": {"x": 1}}, "monteclora_config", "Train without it"),
    ({"use_bdlora": {"x": 1}}, "use_bdlora", "Train without it"),
    ({"of_a_later_peft": 0.5}, "of_a_later_peft=0.5", "unknown"),
    *(
        ({"init_lora_weights": init}, f"init_lora_weights='{init}'", "path_initial_model_for_weight_conversion")
        for init in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "unheard_of")
    ),
]


@pytest.mark.parametrize(("change", "named", "hint"), REFUSED, ids=[named for _, named, _ in REFUSED])
def test_settings_other_than_plain_lora_on_an_unchanged_base_are_refused_by_name(
    adapter: Adapter, aligned: Checkpoint, change: dict[str, Any], named: str, hint: str
) -> None:
    with pytest.raises(StayalignedError) as caught:
        lora_layers(with_config(adapter, **change), aligned)
    assert named in caught.value.message
    assert hint in str(caught.value.hint)


def test_every_setting_of_peft_is_supported_neutral_or_refused(adapter: Adapter) -> None:
    from peft import LoraConfig

    default = LoraConfig(target_modules=["q_proj"]).to_dict()
    refuse_unsupported(with_config(adapter, **default))
    acted_on = {
        *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
        *("inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out"),
        *("use_rslora", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "megatron_core"),
        "target_parameters",
        *("modules_to_save", "trainable_token_indices", "ensure_weight_tying"),
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size"),
    }
    for name in default.keys() - acted_on:
        with pytest.raises(StayalignedError, match=name):
            refuse_unsupported(with_config(adapter, **{name: "something"}))


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", "eva", "mica"])
def test_inits_that_do_not_change_the_base_are_accepted(adapter: Adapter, init: object) -> None:
    refuse_unsupported(with_config(adapter, init_lora_weights=init))


def test_settings_that_an_older_peft_did_not_write_get_their_defaults(adapter: Adapter, aligned: Checkpoint) -> None:
    kept = ("peft_type", "r", "lora_alpha", "target_modules")
    old = Adapter(MappingProxyType({k: adapter.config[k] for k in kept}), adapter.tensors, adapter.directory)
    assert lora_layers(old, aligned) == lora_layers(adapter, aligned)


@pytest.mark.parametrize("rslora", [False, True])
def test_rank_and_scaling_equal_those_of_pefts_layers(tmp_path: Path, aligned: Checkpoint, rslora: bool) -> None:
    from peft import PeftModel

    source = write_pico_adapter(
        tmp_path / "adapter",
        aligned.directory,
        target_modules=["q_proj", "up_proj"],
        rank_pattern={"1.self_attn.q_proj": 3},
        alpha_pattern={".*up_proj": 5},
        use_rslora=rslora,
    )
    live: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(aligned.directory), source)
    layers = lora_layers(read_adapter(source), aligned)
    assert len(layers) == 4
    assert len({(layer.rank, layer.scaling) for layer in layers}) == 3
    for layer in layers:
        module = live.base_model.model.get_submodule(layer.name)
        assert (layer.rank, layer.scaling) == (module.r["default"], module.scaling["default"])
        assert (layer.out_features, layer.in_features) == tuple(module.get_delta_weight("default").shape)


def test_convolutions_are_refused_by_module(tmp_path: Path) -> None:
    recurrent = open_checkpoint(write_pico_checkpoint(tmp_path / "model", "recurrent_gemma"))
    source = write_pico_adapter(tmp_path / "a", recurrent.directory, r=32, target_modules=["conv_1d"])
    with pytest.raises(StayalignedError, match=r"only LoRA on linear layers.*conv_1d \(Conv1d\)"):
        lora_layers(read_adapter(source), recurrent)


def test_one_error_lists_missing_and_unexpected_tensors(adapter: Adapter, aligned: Checkpoint) -> None:
    tensors = dict(adapter.tensors)
    first = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    tensors["base_model.model.stranger.lora_A.weight"] = tensors.pop(first)
    with pytest.raises(StayalignedError) as caught:
        lora_layers(with_tensors(adapter, tensors), aligned)
    assert f"Missing: {first}" in caught.value.message
    assert "Not expected: base_model.model.stranger.lora_A.weight" in caught.value.message


def test_an_adapter_of_another_model_is_refused(tmp_path: Path, adapter: Adapter) -> None:
    wider = open_checkpoint(write_pico_checkpoint(tmp_path / "wider", hidden_size=48))
    with pytest.raises(StayalignedError, match=r"lora_A.weight has the shape \(4, 32\), but .*wider expects \(4, 48\)"):
        lora_layers(adapter, wider)
    deeper = open_checkpoint(write_pico_checkpoint(tmp_path / "deeper", num_hidden_layers=3))
    with pytest.raises(StayalignedError, match=r"Missing: .*layers\.2"):
        lora_layers(adapter, deeper)
    other = open_checkpoint(write_pico_checkpoint(tmp_path / "gpt2", "gpt2"))
    with pytest.raises(StayalignedError, match="can't place the adapter on a GPT2LMHeadModel"):
        lora_layers(adapter, other)


@pytest.mark.parametrize("broken", ["empty", "flat", "nan", "integer", "fp8"])
def test_tensors_that_are_not_factors_are_refused(adapter: Adapter, aligned: Checkpoint, broken: str) -> None:
    key = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
    bad = {
        "empty": torch.empty(0),
        "flat": adapter.tensors[key].flatten(),
        "nan": adapter.tensors[key] * torch.nan,
        "integer": adapter.tensors[key].to(torch.int8),
        "fp8": adapter.tensors[key].to(torch.float8_e4m3fn),
    }[broken]
    problem = {"nan": " holds NaN", "integer": " is stored as int8", "fp8": " is stored as float8_e4m3fn"}
    with pytest.raises(StayalignedError, match=key + problem.get(broken, "")):
        lora_layers(with_tensors(adapter, {**adapter.tensors, key: bad}), aligned)


def test_quantized_and_foreign_models_are_refused(tmp_path: Path, aligned: Checkpoint) -> None:
    for change, expected in (
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantized"),
        ({"model_type": "not_a_model", "auto_map": {"AutoModelForCausalLM": "code.Model"}}, "not_a_model"),
    ):
        directory = tmp_path / expected
        shutil.copytree(aligned.directory, directory)
        config = json.loads((directory / "config.json").read_text()) | change
        (directory / "config.json").write_text(json.dumps(config))
        with pytest.raises(StayalignedError, match=expected):
            meta_model(Checkpoint(directory))


def test_a_checkpoint_without_configuration_is_named(tmp_path: Path, aligned: Checkpoint) -> None:
    shutil.copy(aligned.directory / "model.safetensors", tmp_path)
    with pytest.raises(StayalignedError, match=r"config\.json"):
        meta_model(Checkpoint(tmp_path))


def test_a_copied_base_weight_that_is_not_the_models_is_refused(tmp_path: Path) -> None:
    tied = open_checkpoint(write_pico_checkpoint(tmp_path / "tied", tie_word_embeddings=True))
    source = write_pico_adapter(tmp_path / "adapter", tied.directory, target_modules=["lm_head"])
    tensors = load_file(source / "adapter_model.safetensors")
    tensors["base_model.model.lm_head.base_layer.weight"] += 1
    save_file(tensors, source / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StayalignedError, match=r"lm_head\.base_layer\.weight is not the weight"):
        lora_layers(read_adapter(source), tied)


def test_the_private_host_apis_that_placement_uses_exist() -> None:
    """PEFT: inject_adapter_in_model with low_cpu_mem_usage, LoraLayer.r/.scaling/.get_base_layer, tuners.lora.Linear,
    Embedding and ParamWrapper with .parameter_name/.num_experts/.get_param.

    transformers: conversion_mapping.get_model_conversion_mapping, core_model_loading.rename_source_key,
    dot_natural_key, WeightRenaming, WeightConverter with .add_tensor/.convert, PreTrainedModel.all_tied_weights_keys.
    """
    import inspect

    from peft import inject_adapter_in_model
    from peft.tuners.lora import Linear, ParamWrapper
    from transformers import conversion_mapping, core_model_loading

    assert "low_cpu_mem_usage" in inspect.signature(inject_adapter_in_model).parameters
    assert callable(Linear.get_base_layer)
    assert callable(ParamWrapper.get_param)
    assert "is_transposed" in inspect.getsource(ParamWrapper.update_layer)
    assert next(iter(inspect.signature(conversion_mapping.get_model_conversion_mapping).parameters)) == "model"
    assert list(inspect.signature(core_model_loading.rename_source_key).parameters)[:5] == [
        *("source_key", "weight_renamings", "weight_converters", "base_model_prefix", "meta_state_dict")
    ]
    assert issubclass(core_model_loading.WeightRenaming, core_model_loading.WeightTransform)
    assert issubclass(core_model_loading.WeightConverter, core_model_loading.WeightTransform)
    converter = core_model_loading.WeightConverter
    assert list(inspect.signature(converter.add_tensor).parameters)[1:4] == [
        "target_key",
        "source_key",
        "source_pattern",
    ]
    assert {"layer_name", "model", "config"} <= inspect.signature(converter.convert).parameters.keys()
    assert core_model_loading.dot_natural_key("layers.10") > core_model_loading.dot_natural_key("layers.2")


PEFT_RULES: list[dict[str, Any]] = [
    {"target_modules": ["q_proj", "layers.1.mlp.up_proj"]},
    {"target_modules": ["proj"]},
    {"target_modules": r"model\.layers\.\d\.self_attn\.[qk]"},
    {"target_modules": r".*(q|v)_proj"},
    {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
    {"target_modules": r".*_proj", "exclude_modules": r".*mlp.*"},
]


@pytest.mark.parametrize("settings", PEFT_RULES, ids=str)
def test_module_names_are_matched_by_pefts_rules(settings: dict[str, Any]) -> None:
    from peft import LoraConfig
    from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists
    from peft.utils.other import get_pattern_key

    modules = [name.removesuffix(".weight") for name in pico_model().state_dict()]
    for module in modules:
        found = check_target_module_exists(LoraConfig(**settings), module)
        assert is_targeted(settings, module) == (bool(found) and not isinstance(found, _ExcludedModule)), module
        patterns = {"q_proj": 1, r"layers\.1\..*": 2, "up_proj": 3, "proj": 4}
        key = get_pattern_key(list(patterns), module)
        assert pattern_value(patterns, module, 0) == patterns.get(key, 0)


STORED_WHOLE: list[dict[str, Any]] = [
    {"modules_to_save": ["embed_tokens", "lm_head"]},
    {"modules_to_save": ["lm_head", "norm", "input_layernorm"]},
    {"trainable_token_indices": [1, 2]},
    {"trainable_token_indices": {"embed_tokens": [3]}},
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("settings", STORED_WHOLE, ids=str)
@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], "all-linear"], ids=str)
def test_layers_beside_whole_embeddings_heads_and_norms_are_placed(
    tmp_path: Path, aligned: Checkpoint, settings: dict[str, Any], targets: Any
) -> None:
    from peft import PeftModel

    source = write_pico_adapter(tmp_path / "adapter", aligned.directory, target_modules=targets, **settings)
    adapter = read_adapter(source)
    live: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(aligned.directory), source)
    layers = lora_layers(adapter, aligned)
    assert len(layers) == (4 if isinstance(targets, list) else 14)
    for layer in layers:
        factors = adapter.factors(layer)
        expected = live.base_model.model.get_submodule(layer.name).get_delta_weight("default")
        torch.testing.assert_close(factors.scaling * factors.b @ factors.a, expected)
    assert "copied unchanged" in str(note_on_whole(adapter))


def test_linear_layers_beside_the_factors_are_refused_by_name(tmp_path: Path, aligned: Checkpoint) -> None:
    source = write_pico_adapter(tmp_path / "adapter", aligned.directory, modules_to_save=["up_proj"])
    with pytest.raises(StayalignedError, match=r"stored whole are not low-rank updates: .*up_proj\.weight"):
        lora_layers(read_adapter(source), aligned)


@pytest.mark.filterwarnings("ignore")
def test_a_resized_vocabulary_does_not_stop_the_linear_layers(tmp_path: Path, aligned: Checkpoint) -> None:
    from peft import LoraConfig, get_peft_model

    from stayaligned.hf.models import load_finetuned
    from stayaligned.hf.placement.layers import place_adapter
    from stayaligned.weights.deltas import pair_weights

    model = AutoModelForCausalLM.from_pretrained(aligned.directory)
    model.resize_token_embeddings(270)
    model.save_pretrained(tmp_path / "resized")
    adapted: Any = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.base_model.model.config.name_or_path = str(aligned.directory)
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    adapter = read_adapter(tmp_path / "adapter")
    placed = place_adapter(adapter, aligned, resized := open_checkpoint(tmp_path / "resized"))
    assert len(pair_weights(aligned, resized, {p.layer.name: (p.aligned, p.base) for p in placed})) == 2
    assert "lm_head.weight, model.embed_tokens.weight" in str(note_on_whole(adapter))
    with pytest.raises(
        StayalignedError, match=r"embed_tokens\.weight has 270 rows, but the model's vocabulary has 261"
    ):
        load_finetuned(aligned.directory, tmp_path / "adapter")
    load_finetuned(tmp_path / "resized", tmp_path / "adapter")


def test_a_lora_whose_factors_are_tied_to_those_of_the_head_is_refused(tmp_path: Path) -> None:
    tied = write_pico_checkpoint(tmp_path / "tied", tie_word_embeddings=True)
    adapter = write_pico_adapter(tmp_path / "a", tied, target_modules=["embed_tokens"], ensure_weight_tying=True)
    with pytest.raises(StayalignedError, match="ensure_weight_tying ties the factors"):
        lora_layers(read_adapter(adapter), open_checkpoint(tied))
