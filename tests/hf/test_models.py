"""Checkpoints and adapters load completely or are refused with one error that says what is wrong."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from stayaligned.core.errors import StayalignedError
from stayaligned.hf.models import attach_lora, load_finetuned, load_model, load_tokenizer, merge_adapter, weight_types
from stayaligned.hf.targets import linear_names, unfit_names
from stayaligned.testing import byte_tokenizer, pico_model, write_pico_adapter, write_pico_checkpoint

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_pico_checkpoint(tmp_path_factory.mktemp("models") / "checkpoint")


@pytest.fixture
def adapter(checkpoint, tmp_path):
    model = attach_lora(load_model(checkpoint), {"r": 2, "target_modules": ["q_proj"]})
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_a_model_loads_as_stored_and_ready_to_evaluate(checkpoint, tmp_path):
    model = load_model(checkpoint)
    assert not model.training
    assert model.dtype == torch.float32
    for name, weight in pico_model().state_dict().items():
        assert torch.equal(weight, model.state_dict()[name])
    pico_model().to(torch.bfloat16).save_pretrained(tmp_path)
    assert load_model(str(tmp_path)).dtype == torch.bfloat16
    assert load_model(tmp_path, dtype=torch.float32).dtype == torch.float32


def test_a_tokenizer_needs_a_chat_template(checkpoint, tmp_path):
    assert load_tokenizer(checkpoint).chat_template
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    pico_model().config.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(StayalignedError, match="has no chat template"):
        load_tokenizer(tmp_path)


def test_a_directory_that_is_no_checkpoint_is_an_error(checkpoint, adapter, tmp_path):
    with pytest.raises(StayalignedError, match="no such directory"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(StayalignedError, match="is an adapter, not a model") as caught:
        load_model(adapter)
    assert f"trained on ({checkpoint})" in str(caught.value.hint)
    (tmp_path / "empty").mkdir()
    with pytest.raises(StayalignedError, match=r"has no config.json"):
        load_tokenizer(tmp_path / "empty")
    (tmp_path / "file").write_text("x")
    with pytest.raises(StayalignedError, match="no such directory"):
        load_model(tmp_path / "file")


def test_an_error_says_which_part_of_a_checkpoint_is_missing(checkpoint, tmp_path):
    pico_model().config.save_pretrained(tmp_path)
    with pytest.raises(StayalignedError, match=r"holds neither model\.safetensors nor"):
        load_model(tmp_path)
    with pytest.raises(StayalignedError, match="can't load the tokenizer") as caught:
        load_tokenizer(tmp_path)
    assert "tokenizer.json" in str(caught.value)


def test_pickled_weights_are_not_read(tmp_path):
    model = pico_model()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(StayalignedError, match="holds neither") as caught:
        load_model(tmp_path)
    assert "pickled weights" in str(caught.value.hint)


def test_missing_weights_are_an_error(checkpoint, tmp_path):
    directory = write_pico_checkpoint(tmp_path / "short")
    weights = load_file(directory / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        StayalignedError, match=r"lacks 1 weights of a LlamaForCausalLM, such as model.layers.1.mlp.up_proj"
    ):
        load_model(directory)


def test_tied_weights_are_not_missing(tmp_path):
    load_model(write_pico_checkpoint(tmp_path, tie_word_embeddings=True))


def test_code_from_a_checkpoint_is_not_run(tmp_path):
    config = {"model_type": "mystery", "auto_map": {"AutoModelForCausalLM": "code.Mystery", "AutoConfig": "code.C"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(StayalignedError, match="can't load the model"):
        load_model(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_hub_id_that_is_not_cached_is_refused_offline_with_the_reason():
    with pytest.raises(StayalignedError, match="owner/absent-model") as caught:
        load_model("owner/absent-model")
    assert "HF_HUB_OFFLINE" in str(caught.value)


def test_lora_settings_pass_through_and_only_the_adapter_trains():
    model = attach_lora(pico_model(), {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj"], "use_rslora": True})
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.use_rslora, config.task_type) == (3, 7, True, "CAUSAL_LM")
    assert {name.rpartition("lora_")[1] for name, p in model.named_parameters() if p.requires_grad} == {"lora_"}


def test_a_misspelt_lora_setting_gets_a_suggestion():
    with pytest.raises(StayalignedError, match=r"lora.lora_alfa: unknown LoRA setting") as caught:
        attach_lora(pico_model(), {"lora_alfa": 8})
    assert "'lora_alpha'" in str(caught.value)


@pytest.mark.parametrize("lora", [{"target_modules": ["nothing"]}, {"target_modules": ["q_proj"], "r": 0}])
def test_lora_that_does_not_fit_names_the_linear_modules(lora):
    with pytest.raises(StayalignedError, match=r"^lora: ") as caught:
        attach_lora(pico_model(), lora)
    assert "down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj" in str(caught.value)


@pytest.mark.parametrize(
    ("architecture", "given", "left_out"),
    [
        ("mamba", None, {"dt_proj", "out_proj"}),
        ("jamba", ["q_proj"], {"dt_proj", "q_proj"}),
        ("falcon_h1", None, {"out_proj"}),
        ("bamba", None, None),
        ("llama", None, None),
    ],
)
def test_all_linear_skips_modules_that_lora_cannot_adapt_with_a_warning(architecture, given, left_out, caplog):
    model = pico_model(architecture)
    every = set(linear_names(model)) - {"lm_head"}
    adapted = attach_lora(model, {"r": 2, "target_modules": "all-linear", "exclude_modules": given})
    assert adapted.peft_config["default"].exclude_modules == left_out
    layers = {name.split(".lora_B")[0].rpartition(".")[2] for name, _ in adapted.named_parameters() if "lora_B" in name}
    assert layers == every - (left_out or set())
    said = [record.getMessage() for record in caplog.records if record.name.startswith("stayaligned")]
    named = {name for name in every if f" {name} (" in " ".join(said)}
    assert named == (left_out or set()) - set(given or ())
    assert len(said) == bool(named)


def test_excluding_adds_names_to_a_regular_expression():
    adapted = attach_lora(
        pico_model("mamba"), {"r": 2, "target_modules": "all-linear", "exclude_modules": r".*\.1\.mixer\.x_proj"}
    )
    layers = {
        name.split(".lora_B")[0].split("layers.")[1] for name, _ in adapted.named_parameters() if "lora_B" in name
    }
    assert layers == {"0.mixer.in_proj", "0.mixer.x_proj", "1.mixer.in_proj"}


@pytest.mark.parametrize(
    ("target", "problem"),
    [
        ("dt_proj", "dt_proj would never learn: MambaForCausalLM reads its weight"),
        ("out_proj", "'out_proj' is incompat"),
    ],
)
def test_an_impossible_lora_target_is_an_error_with_the_possible_ones(target, problem):
    with pytest.raises(StayalignedError, match=problem) as caught:
        attach_lora(pico_model("mamba"), {"r": 2, "target_modules": ["in_proj", target]})
    assert "Possible targets: in_proj, lm_head, x_proj; `target_modules: all-linear`" in str(caught.value)


def test_finding_targets_changes_neither_the_random_state_nor_the_modes():
    model = pico_model("jamba", attention_dropout=0.5)
    model.model.layers[1].train()
    before, state = [module.training for module in model.modules()], torch.get_rng_state()
    assert unfit_names(model).keys() == {"dt_proj"}
    assert [module.training for module in model.modules()] == before
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_linear_names_include_gpt2s_transposed_layers():
    assert linear_names(pico_model("gpt2")) == ["c_attn", "c_fc", "c_proj", "lm_head"]


def test_a_finetuned_model_generates_with_its_adapter(checkpoint, adapter):
    ids = torch.arange(10)[None]
    with torch.no_grad():
        plain, adapted = (load_finetuned(str(checkpoint), a)(ids).logits for a in (None, adapter))
        merged = load_finetuned(str(checkpoint), adapter).merge_and_unload()(ids).logits
    assert not torch.allclose(plain, adapted)
    assert torch.allclose(adapted, merged, atol=1e-5)


MERGED = {
    "llama": ("llama", {"target_modules": "all-linear"}),
    "embeddings": ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
    "DoRA": ("llama", {"target_modules": ["v_proj"], "use_dora": True}),
    "GPT-2": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "Mixtral": (
        "mixtral",
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MERGED)
def test_a_merge_equals_pefts_in_fp32_rounded_once(tmp_path, name, dtype):
    architecture, lora = MERGED[name]
    base = write_pico_checkpoint(tmp_path / "base", architecture)
    pico_model(architecture).to(dtype).save_pretrained(base)
    adapter = write_pico_adapter(tmp_path / "adapter", base, **lora)
    merged = merge_adapter(base, adapter)
    exact = PeftModel.from_pretrained(load_model(base, dtype=torch.float32), adapter).merge_and_unload().state_dict()
    assert set(weight_types(merged).values()) == {dtype}
    before = load_model(base).state_dict()
    for key, weight in merged.state_dict().items():
        assert torch.equal(weight, exact[key].to(dtype)), key
    assert any(not torch.equal(before[key], weight) for key, weight in merged.state_dict().items())


def test_a_merge_that_overflows_the_stored_type_is_refused(tmp_path):
    base = write_pico_checkpoint(tmp_path / "base")
    model = pico_model()
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.fill_(65504.0)
    model.to(torch.float16).save_pretrained(base)
    adapter = write_pico_adapter(tmp_path / "adapter", base, lora_alpha=10_000)
    with pytest.raises(StayalignedError, match=r"layers\.0\.self_attn\.q_proj\.weight: the weight overflows"):
        merge_adapter(base, adapter)


def test_an_adapter_that_is_missing_or_pickled_is_refused(checkpoint, adapter):
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(StayalignedError, match=r"has no adapter_model\.safetensors"):
        load_finetuned(str(checkpoint), adapter)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("layers", "problem"), [(1, "which lacks 2 of its weights"), (3, "missing adapter keys")])
def test_an_adapter_of_a_model_with_other_layers_is_refused(adapter, tmp_path, layers, problem):
    other = write_pico_checkpoint(tmp_path / "other", num_hidden_layers=layers)
    with pytest.raises(StayalignedError, match=f"does not fit the model.*{problem}"):
        load_finetuned(str(other), adapter)


def test_an_adapter_of_a_model_with_other_shapes_is_refused(adapter, tmp_path):
    other = write_pico_checkpoint(tmp_path / "other", hidden_size=64)
    with pytest.raises(StayalignedError, match="does not fit the model"):
        load_finetuned(str(other), adapter)


TIED = {
    "LoRA on the head": {"target_modules": ["lm_head", "q_proj"]},
    "LoRA on the embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "tied LoRA": {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    "whole head": {"modules_to_save": ["lm_head"]},
    "whole embedding": {"modules_to_save": ["embed_tokens"]},
    "tied and whole": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "tokens": {"trainable_token_indices": [1, 2]},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TIED)
def test_a_merge_into_tied_embeddings_computes_as_the_adapter_does(tmp_path, name):
    base = write_pico_checkpoint(tmp_path / "base", tie_word_embeddings=True)
    adapter = write_pico_adapter(tmp_path / "adapter", base, **TIED[name])
    torch.manual_seed(0)
    stored = load_file(adapter / WEIGHTS)
    changed = {key: value + torch.randn_like(value) for key, value in stored.items() if "lora_" not in key}
    if "ensure_weight_tying" in TIED[name] and changed:
        changed = dict.fromkeys(changed, next(iter(changed.values())))
    save_file({key: value.clone() for key, value in {**stored, **changed}.items()}, adapter / WEIGHTS)
    merge_adapter(base, adapter).save_pretrained(tmp_path / "merged")
    ids = torch.arange(10)[None]
    with torch.no_grad():
        plain, adapted = (load_finetuned(base, one)(ids).logits for one in (None, adapter))
        merged = load_model(tmp_path / "merged")(ids).logits
    assert torch.allclose(adapted, merged, atol=1e-4)
    assert not torch.allclose(plain, adapted, atol=1e-2)


LOST = ("model.nothere.weight", "lm_head.modules_to_save.default.weight", "lm_head.modules_to_save.weight")


@pytest.mark.parametrize("name", LOST)
def test_whole_weights_that_peft_would_ignore_are_an_error(checkpoint, adapter, name):
    weights = load_file(adapter / WEIGHTS)
    save_file({**weights, f"base_model.model.{name}": torch.ones(261, 32)}, adapter / WEIGHTS)
    with pytest.raises(StayalignedError, match=f"lacks 1 of its weights, such as base_model.model.{name}"):
        load_finetuned(checkpoint, adapter)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_of_a_diverged_training_is_an_error(checkpoint, adapter, value):
    weights = load_file(adapter / WEIGHTS)
    first = min(weights)
    weights[first][0, 0] = value
    save_file(weights, adapter / WEIGHTS)
    with pytest.raises(StayalignedError, match=f"{first} holds NaN or infinity"):
        load_finetuned(checkpoint, adapter)


def test_an_adapter_that_changes_nothing_is_said_to(checkpoint, adapter, caplog):
    load_finetuned(checkpoint, adapter)
    assert not caplog.records
    weights = load_file(adapter / WEIGHTS)
    save_file({name: value * ("lora_A" in name) for name, value in weights.items()}, adapter / WEIGHTS)
    load_finetuned(checkpoint, adapter)
    assert "the update of every layer is zero" in caplog.text


def test_an_adapter_of_another_model_of_the_same_shape_is_said_to_be(checkpoint, adapter, tmp_path, caplog):
    other = write_pico_checkpoint(tmp_path / "other", seed=3)
    load_model(checkpoint).to(torch.bfloat16).save_pretrained(tmp_path / "half")
    load_model(tmp_path / "half").to(torch.float32).save_pretrained(tmp_path / "same")
    named(adapter, tmp_path / "half")
    load_finetuned(tmp_path / "same", adapter)
    named(adapter, "/nowhere/model")
    load_finetuned(checkpoint, adapter)
    assert not caplog.records
    named(adapter, checkpoint)
    load_finetuned(other, adapter)
    assert f"was trained on {checkpoint}, not on {other}" in caplog.text


def named(adapter, model):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(model)}))


def test_a_model_of_a_diverged_training_is_an_error(tmp_path):
    model = pico_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(StayalignedError, match=r"layers\.1\.mlp\.up_proj\.weight holds NaN or infinity"):
        load_finetuned(tmp_path, None)


def test_a_quantized_model_whose_package_is_missing_says_what_to_do(tmp_path):
    model = write_pico_checkpoint(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(StayalignedError, match="can't load the model") as caught:
        load_model(model)
    assert "bf16" in str(caught.value.hint)
