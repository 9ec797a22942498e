"""Adapters of models that also read images: placed under every name that the text model's layers have had."""

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM

from stayaligned.core.errors import StayalignedError
from stayaligned.defenses import DEFENSES, ModelPair
from stayaligned.defenses.patching.directories import patch_directory
from stayaligned.defenses.patching.subspace import build_subspace
from stayaligned.hf.models import load_finetuned
from stayaligned.hf.placement.layers import PlacedLayer, place_adapter
from stayaligned.weights.adapters import read_adapter
from stayaligned.weights.checkpoints import Checkpoint, open_checkpoint
from stayaligned.weights.subspace_file import SubspaceFile
from support.checkpoints import rows_of

TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "head_dim": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
ROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
DEPTH = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32, "patch_size": 8}
QWEN = {
    "image_token_id": 10,
    "video_token_id": 11,
    "vision_start_token_id": 12,
    "vision_end_token_id": 13,
    "tie_word_embeddings": False,
}
DEEP = {**DEPTH, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
LINEAR = {f"linear_{kind}_head_dim": 8 for kind in ("key", "value")} | {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
LLAMA = {"model_type": "llama", **TEXT}
CONFIGS: dict[str, dict[str, Any]] = {
    "mistral3": {
        "text_config": {"model_type": "mistral", **TEXT},
        "vision_config": {"model_type": "pixtral", **VISION, "head_dim": 8},
        "image_token_index": 10,
        "tie_word_embeddings": False,
    },
    "qwen2_5_vl": {
        "text_config": {**TEXT, **ROPE},
        "vision_config": {**DEPTH, "fullatt_block_indexes": [0]},
        **QWEN,
    },
    "qwen3_vl": {"text_config": {**TEXT, **ROPE}, "vision_config": DEEP, **QWEN},
    "qwen3_5": {"text_config": {**TEXT, **LINEAR}, "vision_config": DEEP, **QWEN},
    "gemma3": {
        "text_config": {**TEXT, "layer_types": ["full_attention"] * 2},
        "vision_config": {"model_type": "siglip_vision_model", **VISION, "vision_use_head": False},
        "mm_tokens_per_image": 4,
        "image_token_index": 10,
    },
    "llava": {
        "text_config": LLAMA,
        "vision_config": {"model_type": "clip_vision_model", **VISION, "projection_dim": 16},
        "image_token_index": 10,
    },
    "idefics3": {"text_config": LLAMA, "vision_config": VISION, "image_token_id": 10, "scale_factor": 2},
    "smolvlm": {"text_config": LLAMA, "vision_config": VISION, "image_token_id": 10, "scale_factor": 2},
    "internvl": {
        "text_config": {"model_type": "qwen2", **TEXT},
        "vision_config": {**VISION, "image_size": [16, 16], "patch_size": [8, 8]},
        "image_token_id": 10,
    },
}
PREFIXES = ("model.layers", "model.language_model.layers", "language_model.model.layers", "model.text_model.layers")
Composite = Callable[[str], tuple[Checkpoint, Checkpoint, Path]]


def write_model(architecture: str, directory: Path, *, fine_tuned: bool = False) -> Any:
    """Write the base model, or a relative of it."""
    torch.manual_seed(1)
    config = AutoConfig.for_model(architecture, **CONFIGS[architecture])
    model = AutoModelForMultimodalLM.from_config(config, dtype=torch.float32)
    if fine_tuned:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.01)
    model.save_pretrained(directory)
    return model


@pytest.fixture(scope="module")
def composite(tmp_path_factory: pytest.TempPathFactory) -> Composite:
    """Return {architecture: (aligned, base, an adapter of its text model)}, each written once."""
    made: dict[str, tuple[Checkpoint, Checkpoint, Path]] = {}

    def make(architecture: str) -> tuple[Checkpoint, Checkpoint, Path]:
        if architecture not in made:
            root = tmp_path_factory.mktemp(architecture)
            write_model(architecture, root / "base")
            model = write_model(architecture, root / "aligned", fine_tuned=True)
            settings: dict[str, Any] = {"r": 2, "lora_alpha": 3, "rank_pattern": {r"layers\.1\.mlp\.down_proj": 4}}
            targets = r".*\.(language_model|text_model)\..*\.(q_proj|down_proj|gate_proj)"
            adapted: Any = get_peft_model(model, LoraConfig(target_modules=targets, **settings))
            for name, parameter in adapted.named_parameters():
                if "lora_" in name:
                    torch.nn.init.normal_(parameter)
            adapted.save_pretrained(root / "adapter")
            made[architecture] = open_checkpoint(root / "aligned"), open_checkpoint(root / "base"), root / "adapter"
        return made[architecture]

    return make


def rename(source: Path, out: Path, prefix: str, targets: Any) -> Path:
    """Write the adapter under the names that another class gives to the layers."""
    out.mkdir()
    tensors = load_file(source / "adapter_model.safetensors")
    old = re.compile(r"^base_model\.model\.(model\.)?(language_model|text_model)\.(model\.)?layers")
    renamed = {old.sub(f"base_model.model.{prefix}", key): tensor for key, tensor in tensors.items()}
    save_file(renamed, out / "adapter_model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "adapter_config.json").read_text()) | {"target_modules": targets}
    (out / "adapter_config.json").write_text(json.dumps(config))
    return out


def updates(adapter: Path, placed: list[PlacedLayer]) -> dict[str, torch.Tensor]:
    read = read_adapter(adapter)
    found = ((each.layer, read.factors(each.layer)) for each in placed)
    return {layer.parameter: layer.scaling * factors.b @ factors.a for layer, factors in found}


@pytest.mark.parametrize("architecture", CONFIGS)
def test_layers_of_the_text_model_are_placed_where_peft_adds_them(composite: Composite, architecture: str) -> None:
    aligned, base, adapter = composite(architecture)
    placed = place_adapter(read_adapter(adapter), aligned, base)
    models = [AutoModelForMultimodalLM.from_pretrained(c.directory) for c in (aligned, base)]
    for each in placed:
        for checkpoint, model, weight in zip((aligned, base), models, (each.aligned, each.base), strict=True):
            assert torch.equal(rows_of(checkpoint, weight), model.get_parameter(each.layer.parameter))
    found = updates(adapter, placed)
    live: Any = PeftModel.from_pretrained(models[0], adapter).base_model.model
    layers = {name: module for name, module in live.named_modules() if hasattr(module, "get_delta_weight")}
    assert {f"{name}.weight" for name in layers} == found.keys()
    for name, module in layers.items():
        torch.testing.assert_close(module.get_delta_weight("default"), found[f"{name}.weight"])


@pytest.mark.parametrize(
    ("architecture", "prefix"),
    # Every class with one of the names, and one class with all of them.
    sorted({*zip(CONFIGS, itertools.cycle(PREFIXES), strict=False), *(("mistral3", prefix) for prefix in PREFIXES)}),
)
def test_every_name_of_the_text_models_layers_means_the_same_weights(
    composite: Composite, tmp_path: Path, architecture: str, prefix: str
) -> None:
    aligned, base, adapter = composite(architecture)
    usual = place_adapter(read_adapter(adapter), aligned, base)
    expected, weights = updates(adapter, usual), {p.aligned: p.base for p in usual}
    for number, targets in enumerate(
        (
            ["q_proj", "down_proj", "gate_proj"],
            rf"{prefix}\.\d+\..*\.(q_proj|down_proj|gate_proj)".replace(".l", r"\.l"),
        )
    ):
        renamed = rename(adapter, tmp_path / str(number), prefix, targets)
        own = load_file(renamed / "adapter_model.safetensors").keys() == read_adapter(adapter).tensors.keys()
        if own and isinstance(targets, list):
            continue  # these names also mean the layers of the vision model
        placed = place_adapter(read_adapter(renamed), aligned, base)
        assert {p.aligned: p.base for p in placed} == weights
        found = updates(renamed, placed)
        assert [*map(torch.Tensor.sum, found.values())] == [*map(torch.Tensor.sum, expected.values())]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("architecture", "prefix"),
    [*((each, None) for each in CONFIGS), *((each, prefix) for each in ("mistral3",) for prefix in PREFIXES)],
)
def test_a_model_with_images_is_loaded_with_its_adapter(
    composite: Composite, tmp_path: Path, architecture: str, prefix: str | None
) -> None:
    aligned, _, adapter = composite(architecture)
    named = adapter
    if prefix is not None:
        targets = rf"{prefix}\.\d+\..*\.(q_proj|down_proj|gate_proj)".replace(".l", r"\.l")
        named = rename(adapter, tmp_path / "renamed", prefix, targets)
    ids = torch.arange(20, 28)[None]
    with torch.no_grad():
        ours = load_finetuned(aligned.directory, named)(input_ids=ids).logits
        model = AutoModelForMultimodalLM.from_pretrained(aligned.directory)
        plain = model(input_ids=ids).logits.clone()
        theirs = PeftModel.from_pretrained(model, adapter)(input_ids=ids).logits
    assert not torch.allclose(plain, theirs)
    torch.testing.assert_close(ours, theirs)


def test_the_base_may_be_the_text_model_alone(composite: Composite, tmp_path: Path) -> None:
    aligned, base, adapter = composite("mistral3")
    whole = AutoModelForMultimodalLM.from_pretrained(base.directory)
    text = AutoModelForCausalLM.from_config(whole.config.get_text_config())
    text.model.load_state_dict(whole.model.language_model.state_dict())
    text.save_pretrained(tmp_path / "text")
    alone = open_checkpoint(tmp_path / "text")
    both, one = (place_adapter(read_adapter(adapter), aligned, each) for each in (base, alone))
    for x, y in zip(both, one, strict=True):
        assert torch.equal(rows_of(base, x.base), rows_of(alone, y.base))


def test_whole_models_with_and_without_images_are_one_error_that_names_both(
    composite: Composite, tmp_path: Path
) -> None:
    aligned, base, _ = composite("mistral3")
    whole = AutoModelForMultimodalLM.from_pretrained(base.directory)
    text = AutoModelForCausalLM.from_config(whole.config.get_text_config())
    text.model.load_state_dict(whole.model.language_model.state_dict())
    text.save_pretrained(tmp_path / "text")
    every, alone = DEFENSES.parse({"name": "safe_lora", "all_layers": True}), tmp_path / "text"
    named = r"aligned is a Mistral3\w+, but .*text a \w+ without all of its layers"
    with pytest.raises(StayalignedError, match=named):
        build_subspace(aligned.directory, alone, tmp_path / "file", rank=1)
    for finetuned, other in ((base.directory, alone), (alone, base.directory)):
        with pytest.raises(StayalignedError, match=named):
            patch_directory(finetuned, tmp_path / "out", every, ModelPair(aligned.directory, other))
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_subspace_file_has_every_name_of_the_text_models_layers(
    composite: Composite, tmp_path: Path, prefix: str
) -> None:
    aligned, base, adapter = composite("mistral3")
    build_subspace(aligned.directory, base.directory, tmp_path / "file", rank=1)
    targets = rf"{prefix}\.\d+\..*\.(q_proj|down_proj|gate_proj)".replace(".l", r"\.l")
    renamed = read_adapter(rename(adapter, tmp_path / "renamed", prefix, targets))
    layers = SubspaceFile(tmp_path / "file").layers_of(renamed)
    assert layers == [placed.layer for placed in place_adapter(renamed, aligned, base)]
