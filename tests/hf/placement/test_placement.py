"""For every layout of adapters and models, ΔW in the placed rows equals what PEFT merges."""

import json
import re
import shutil
import subprocess
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers.pytorch_utils import Conv1D

from stayaligned.core.errors import StayalignedError
from stayaligned.hf.placement import layers as hf_layers
from stayaligned.hf.placement.layers import PlacedLayer, linear_weights, meta_model, place_adapter
from stayaligned.testing import write_pico_adapter, write_pico_checkpoint
from stayaligned.weights.adapters import Adapter, read_adapter
from stayaligned.weights.checkpoints import Checkpoint, open_checkpoint
from stayaligned.weights.lora_layout import PLAIN_MODEL_TYPES, place_by_name, plain_layers
from support.checkpoints import EXPERTS, PairOf, in_memory, load, rows_of

JAMBA_EXPERTS = ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"]


@dataclass(frozen=True)
class Layout:
    """An adapter on a pico model."""

    architecture: str
    lora: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    adapter: dict[str, Any] = field(default_factory=dict)
    plain: bool = False
    """Whether tensor names are enough to place the adapter, without PEFT or transformers."""


LAYOUTS = {
    "llama": Layout("llama", plain=True),
    "grouped-query": Layout("llama", {"target_modules": ["q_proj", "k_proj"]}, {"num_key_value_heads": 1}, plain=True),
    "all-linear": Layout("llama", {"target_modules": "all-linear"}, plain=True),
    "patterns and rslora": Layout(
        "llama",
        {
            "target_modules": ["q_proj", "up_proj"],
            "rank_pattern": {"1.self_attn.q_proj": 3, "q_proj": 2},
            "alpha_pattern": {".*up_proj": 5},
            "use_rslora": True,
        },
        plain=True,
    ),
    "rank equal to out_features": Layout("llama", {"target_modules": ["k_proj", "q_proj"], "r": 16}, plain=True),
    "regex": Layout("llama", {"target_modules": r".*\.[01]\.(self_attn\.(q|o)_proj|mlp\.(down_proj|up))"}, plain=True),
    "exclude": Layout(
        "llama", {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["0.self_attn.q_proj"]}, plain=True
    ),
    "layers_to_transform": Layout("llama", {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]}),
    "another name": Layout("llama", adapter={"adapter_name": "customer"}, plain=True),
    "bf16": Layout("llama", adapter={"dtype": "bfloat16"}, plain=True),
    "fp16": Layout("llama", adapter={"dtype": "float16"}, plain=True),
    "head": Layout("llama", {"target_modules": ["q_proj", "lm_head"]}),
    "tied head": Layout("llama", {"target_modules": ["q_proj", "lm_head"]}, {"tie_word_embeddings": True}),
    "tied": Layout("llama", {"target_modules": ["q_proj"]}, {"tie_word_embeddings": True}, plain=True),
    "embedding": Layout("llama", {"target_modules": ["embed_tokens", "v_proj"]}),
    "tied embedding": Layout("llama", {"target_modules": ["embed_tokens"]}, {"tie_word_embeddings": True}),
    "a linear module as a parameter": Layout(
        "llama", {"target_modules": ["k_proj"], "target_parameters": ["q_proj.weight"]}
    ),
    "mistral": Layout("mistral", plain=True),
    "qwen2": Layout("qwen2", {"target_modules": "all-linear"}, plain=True),
    "qwen3": Layout("qwen3", plain=True),
    "gemma": Layout("gemma", plain=True),
    "gpt2": Layout("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "gpt2, said wrongly": Layout("gpt2", {"target_modules": ["attn.c_proj"], "fan_in_fan_out": False}),
    "gpt2 embeddings": Layout("gpt2", {"target_modules": ["wte", "wpe"]}),
    "gpt_neox": Layout("gpt_neox", {"target_modules": ["query_key_value", "embed_out"]}),
    "mixtral": Layout("mixtral", {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "mixtral attention": Layout("mixtral", plain=True),
    "mixtral, one stack": Layout("mixtral", {"target_modules": [], "target_parameters": EXPERTS[1:], "r": 3}),
    "mixtral, patterns": Layout(
        "mixtral",
        {
            "target_modules": ["q_proj"],
            "target_parameters": [*EXPERTS, "gate.weight"],
            "rank_pattern": {"experts.gate_up_proj": 6, "gate.weight": 1},
            "alpha_pattern": {"down_proj": 3},
            "use_rslora": True,
        },
    ),
    "mixtral w1, w2, w3": Layout("mixtral", {"target_modules": ["w1", "w2", "w3", "q_proj"]}),
    "mixtral all-linear": Layout("mixtral", {"target_modules": "all-linear"}, adapter={"dtype": "bfloat16"}),
    "qwen2_moe": Layout("qwen2_moe", {"target_modules": ["gate_up_proj"], "target_parameters": EXPERTS}),
    "qwen2_moe all-linear": Layout("qwen2_moe", {"target_modules": "all-linear"}, plain=True),  # not the experts
    "qwen3_moe": Layout("qwen3_moe", {"target_modules": ["v_proj"], "target_parameters": EXPERTS}),
    "qwen3_moe all-linear": Layout("qwen3_moe", {"target_modules": "all-linear"}),
    "gpt_oss": Layout("gpt_oss", {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "gpt_oss attention and router": Layout(
        "gpt_oss", {"target_modules": ["o_proj"], "target_parameters": ["router.weight"]}
    ),
    "deepseek_v3": Layout("deepseek_v3", {"target_modules": ["q_a_proj", "kv_b_proj"], "target_parameters": EXPERTS}),
    "deepseek_v3 attention": Layout("deepseek_v3", {"target_modules": ["q_a_proj", "o_proj"]}, plain=True),
    "deepseek_v3 all-linear": Layout("deepseek_v3", {"target_modules": "all-linear"}),
    "mamba": Layout("mamba", {"target_modules": "all-linear", "exclude_modules": ["dt_proj", "out_proj"]}),
    "tied mamba": Layout("mamba", {"target_modules": ["in_proj"]}, {"tie_word_embeddings": True}),
    "falcon_mamba": Layout("falcon_mamba", {"target_modules": ["in_proj", "x_proj"]}),
    "mamba2": Layout("mamba2", {"target_modules": ["in_proj"]}),
    "rwkv": Layout("rwkv", {"target_modules": "all-linear"}),
    "xlstm": Layout("xlstm", {"target_modules": "all-linear"}),
    "recurrent_gemma": Layout("recurrent_gemma", {"target_modules": "all-linear"}),
    "jamba": Layout("jamba", {"target_modules": "all-linear", "exclude_modules": ["dt_proj"]}),
    "jamba experts": Layout("jamba", {"target_modules": ["q_proj"], "target_parameters": JAMBA_EXPERTS}),
    "granitemoehybrid": Layout("granitemoehybrid", {"target_modules": "all-linear"}),
    "qwen3_next": Layout("qwen3_next", {"target_modules": "all-linear"}),
    "falcon_h1": Layout("falcon_h1", {"target_modules": "all-linear", "exclude_modules": ["out_proj"]}),
    "bamba": Layout("bamba", {"target_modules": "all-linear"}),
    "lfm2": Layout("lfm2", {"target_modules": "all-linear"}),
}


def adapter_of(layout: Layout, aligned: Checkpoint, directory: Path) -> Adapter:
    return read_adapter(write_pico_adapter(directory, aligned.directory, **layout.adapter, **layout.lora))


def injected(
    monkeypatch: pytest.MonkeyPatch, adapter: Adapter, aligned: Checkpoint, base: Checkpoint
) -> list[PlacedLayer]:
    """`place_adapter` by PEFT's injection, even if names are enough."""
    with monkeypatch.context() as patched:
        patched.setattr(hf_layers, "place_plain_adapter", lambda *_: None)
        return place_adapter(adapter, aligned, base)


def merged_on_disk(adapter: Adapter, placed: list[PlacedLayer], aligned: Checkpoint, out: Path) -> Path:
    """A copy of the checkpoint with each ΔW added to the rows where it was placed."""
    tensors = {name: aligned[name] for name in aligned}
    for each in placed:
        a, b, scaling = adapter.factors(each.layer)
        delta = scaling * (b @ a)
        delta, first = delta.T if each.layer.transposed else delta, 0
        for block in each.aligned:
            stored = tensors[block.name] if block.expert is None else tensors[block.name][block.expert]
            part = stored[block.first_row :][: block.rows]
            part += delta[first : first + len(part)]
            first += len(part)
        assert first == len(delta)
    out.mkdir()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(aligned.directory / "config.json", out)
    return out


def merged_by_peft(adapter: Adapter, aligned: Checkpoint) -> dict[str, torch.Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tied weights
        live: Any = PeftModel.from_pretrained(load(aligned.directory), adapter.directory)
        return live.merge_and_unload().state_dict()


def assert_merges_alike(adapter: Adapter, placed: list[PlacedLayer], aligned: Checkpoint, scratch: Path) -> None:
    before = load(aligned.directory).state_dict()
    expected = merged_by_peft(adapter, aligned)
    ours = load(merged_on_disk(adapter, placed, aligned, scratch)).state_dict()
    assert ours.keys() == expected.keys()
    changed = {name for name in expected if not torch.equal(expected[name], before[name])}
    assert changed
    for name in expected:
        assert torch.equal(ours[name], before[name]) == (name not in changed), name
        torch.testing.assert_close(ours[name], expected[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layers_are_placed_where_peft_merges_them(
    layout: Layout, pair_of: PairOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    aligned, base = pair_of(layout.architecture, **layout.model)
    adapter = adapter_of(layout, aligned, tmp_path / "adapter")
    placed = place_adapter(adapter, aligned, base)

    assert_merges_alike(adapter, placed, aligned, tmp_path / "merged")
    assert (place_by_name(adapter, aligned, base) is not None) == layout.plain
    assert injected(monkeypatch, adapter, aligned, base) == placed
    assert len({each.layer.name for each in placed}) == len(placed)

    for checkpoint, weights in ((aligned, [p.aligned for p in placed]), (base, [p.base for p in placed])):
        model = load(checkpoint.directory)
        for each, weight in zip(placed, weights, strict=True):
            expected = in_memory(model, each.layer.parameter, each.layer.expert)
            assert torch.equal(rows_of(checkpoint, weight), expected), each.layer.name
            shape = (each.layer.out_features, each.layer.in_features)
            assert checkpoint.matrix_shape(weight) == (shape[::-1] if each.layer.transposed else shape)


LEGACY = {
    "mixtral": ("block_sparse_moe", ("w1", "w3", "w2")),
    "qwen3_moe": ("mlp", ("gate_proj", "up_proj", "down_proj")),
}


@pytest.mark.parametrize("architecture", LEGACY)
def test_adapters_on_experts_that_were_modules_in_transformers_4(
    architecture: str, pair_of: PairOf, tmp_path: Path
) -> None:
    aligned, base = pair_of(architecture)
    block, projections = LEGACY[architecture]
    source = write_pico_adapter(tmp_path / "adapter", aligned.directory, r=2, target_modules=["q_proj"])
    tensors = dict(read_adapter(source).tensors)
    generator = torch.Generator().manual_seed(0)
    for name in aligned:
        module = name.removesuffix(".weight")
        if f".{block}.experts." in name and module.endswith(projections):
            out_features, in_features = aligned.shape(name)
            for factor, shape in (("A", (2, in_features)), ("B", (out_features, 2))):
                tensors[f"base_model.model.{module}.lora_{factor}.weight"] = torch.randn(shape, generator=generator)
    save_file(tensors, source / "adapter_model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "adapter_config.json").read_text())
    (source / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["q_proj", *projections]}))

    adapter = read_adapter(source)
    placed = place_adapter(adapter, aligned, base)
    assert len(placed) == 2 * (1 + 4 * 3)
    assert_merges_alike(adapter, placed, aligned, tmp_path / "merged")


@pytest.mark.parametrize("architecture", sorted(PLAIN_MODEL_TYPES))
def test_plain_architectures_store_linear_modules_as_in_memory(
    architecture: str, pair_of: PairOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    aligned, base = pair_of(architecture)
    model = load(aligned.directory)
    assert aligned.config()["model_type"] == architecture
    for name, module in model.named_modules():
        assert not isinstance(module, Conv1D)
        tied = name == "lm_head" and model.config.tie_word_embeddings
        if isinstance(module, torch.nn.Linear) and not tied:
            assert torch.equal(aligned[f"{name}.weight"], module.weight), name
    mixture = any(parameter.ndim == 3 for parameter in model.parameters())
    targets = r".*\.self_attn\.\w+_proj\w*" if mixture else "all-linear"
    adapter = read_adapter(write_pico_adapter(tmp_path / "adapter", aligned.directory, target_modules=targets))
    placed = injected(monkeypatch, adapter, aligned, base)
    assert placed == place_adapter(adapter, aligned, base)
    assert [p.layer for p in placed] == place_by_name(adapter, aligned, base)


def test_plain_adapters_are_placed_without_importing_transformers_or_peft(pair_of: PairOf, tmp_path: Path) -> None:
    aligned, base = pair_of("llama")
    source = write_pico_adapter(tmp_path / "adapter", aligned.directory)
    code = (
        "import sys; from pathlib import Path\n"
        "from stayaligned.weights.adapters import read_adapter\n"
        "from stayaligned.weights.checkpoints import open_checkpoint\n"
        "from stayaligned.hf.placement.layers import place_adapter\n"
        "adapter, aligned, base = sys.argv[1:]\n"
        "placed = place_adapter(read_adapter(Path(adapter)), open_checkpoint(aligned), open_checkpoint(base))\n"
        "print(len(placed), *sorted({'transformers', 'peft', 'accelerate'} & sys.modules.keys()))"
    )
    command = [sys.executable, "-c", code, str(source), str(aligned.directory), str(base.directory)]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.split() == ["4"]


@pytest.mark.parametrize(
    "architecture",
    [
        "llama",
        "gpt2",
        "mixtral",
        "qwen2_moe",
        "gpt_oss",
        "deepseek_v3",
        "gpt_neox",
        "rwkv",
        "recurrent_gemma",
    ],
)
def test_linear_weights_equal_those_of_all_linear_and_experts(
    architecture: str, pair_of: PairOf, tmp_path: Path
) -> None:
    aligned, base = pair_of(architecture)
    weights = {weight.name: weight for weight in linear_weights(aligned, base, aligned)}
    experts = {"target_parameters": EXPERTS} if architecture in ("qwen2_moe", "gpt_oss") else {}
    source = write_pico_adapter(tmp_path / "adapter", aligned.directory, target_modules="all-linear", **experts)
    placed = {p.layer.name: p for p in place_adapter(read_adapter(source), aligned, base)}
    routers = {name for name in weights if name.endswith(("mlp.gate", "mlp.router"))}
    assert bool(routers) == (architecture not in ("llama", "gpt2", "gpt_neox", "rwkv", "recurrent_gemma"))
    assert placed.keys() <= weights.keys()
    # PEFT treats the names of dense and shared experts as those of routed ones, and then skips them
    dense = {name for name in weights if re.search(r"mlp\.(shared_experts\.)?\w+_proj$", name)}
    assert weights.keys() - placed.keys() <= routers | (dense if architecture == "deepseek_v3" else set())
    for name, each in placed.items():
        assert weights[name].stored == (each.aligned, each.base, each.aligned)
        assert weights[name].transposed == each.layer.transposed
    assert not [name for name in weights if "embed" in name or "lm_head" in name or "norm" in name]
    assert list(weights) == [weight.name for weight in linear_weights(base)]


def test_a_weight_that_modules_share_appears_once(tmp_path: Path) -> None:
    shared = {"num_mem_blocks": 1, "use_shared_attention_adapter": False, "tie_word_embeddings": True}
    sizes = {"n_mamba_heads": 2, "mamba_d_state": 8, "attention_head_dim": 16}
    kinds = ["mamba", "hybrid", "mamba", "hybrid"]
    layers = {"num_hidden_layers": 4, "layers_block_type": kinds, **shared, **sizes}
    checkpoint = open_checkpoint(write_pico_checkpoint(tmp_path / "model", "zamba2", **layers))
    weights = linear_weights(checkpoint)
    assert "model.layers.3.shared_transformer.self_attn.q_proj.weight" in meta_model(checkpoint).all_tied_weights_keys
    assert len({weight.stored for weight in weights}) == len(weights)
    assert [weight.name for weight in weights if weight.name.endswith("q_proj")] == [
        "model.layers.1.shared_transformer.self_attn.q_proj"
    ]


def test_expert_stacks_that_peft_would_transpose_are_refused(pair_of: PairOf, tmp_path: Path) -> None:
    aligned, base = pair_of("llama4_text")
    lora = {"target_modules": [], "target_parameters": ["experts.down_proj"]}
    adapter = read_adapter(write_pico_adapter(tmp_path / "adapter", aligned.directory, **lora))
    with pytest.raises(StayalignedError, match=r"experts\.down_proj .*of a Llama4TextExperts"):
        place_adapter(adapter, aligned, base)
    transposed = {weight.name: weight.transposed for weight in linear_weights(aligned)}
    assert transposed["model.layers.0.feed_forward.experts.down_proj[0]"]
    assert not transposed["model.layers.0.self_attn.q_proj"]


@pytest.mark.parametrize(
    ("architecture", "parameter"),
    [
        ("gpt2", "c_attn.weight"),
        ("llama", "embed_tokens.weight"),
        ("mamba", "A_log"),
        ("recurrent_gemma", "conv_1d.weight"),
    ],
)
def test_parameters_that_are_not_linear_maps_are_refused(
    pair_of: PairOf, tmp_path: Path, architecture: str, parameter: str
) -> None:
    aligned, base = pair_of(architecture)
    lora = {"target_modules": [], "target_parameters": [parameter]}
    adapter = read_adapter(write_pico_adapter(tmp_path / "adapter", aligned.directory, **lora))
    with pytest.raises(StayalignedError, match=f"target_parameters: .*{parameter} "):
        place_adapter(adapter, aligned, base)


def test_a_single_transposed_expert_is_refused(pair_of: PairOf, tmp_path: Path) -> None:
    aligned, base = pair_of("gpt_oss", num_local_experts=1, num_experts_per_tok=1)
    lora = {"target_modules": [], "target_parameters": EXPERTS[1:]}
    adapter = read_adapter(write_pico_adapter(tmp_path / "adapter", aligned.directory, **lora))
    with pytest.raises(StayalignedError, match=r"target_parameters: .*experts\.down_proj \(1×64×32"):
        place_adapter(adapter, aligned, base)


def test_missing_tensors_of_a_target_are_detected_for_plain_names(pair_of: PairOf, tmp_path: Path) -> None:
    for model, lost in (({}, "model.layers.1.self_attn.v_proj"), ({"tie_word_embeddings": True}, "lm_head")):
        aligned, base = pair_of("llama", **model)
        targets = ["q_proj", "v_proj", "lm_head"]
        source = write_pico_adapter(tmp_path / lost, aligned.directory, target_modules=targets)
        whole = read_adapter(source)
        kept = {key: tensor for key, tensor in whole.tensors.items() if f".{lost}." not in key}
        save_file(kept, source / "adapter_model.safetensors", metadata={"format": "pt"})
        with pytest.raises(StayalignedError, match=f"Missing: base_model.model.{lost}.lora_A.weight"):
            place_adapter(read_adapter(source), aligned, base)


@pytest.mark.parametrize("quantized", ["aligned", "base"])
def test_the_error_for_a_quantized_checkpoint_names_its_directory(
    pair_of: PairOf, tmp_path: Path, quantized: str
) -> None:
    pair = dict(zip(("aligned", "base"), pair_of("llama"), strict=True))
    adapter = read_adapter(write_pico_adapter(tmp_path / "adapter", pair["aligned"].directory))
    shutil.copytree(pair[quantized].directory, tmp_path / quantized)
    config = tmp_path / quantized / "config.json"
    stored = json.loads(config.read_text()) | {"quantization_config": {"quant_method": "bitsandbytes"}}
    config.write_text(json.dumps(stored))
    pair[quantized] = open_checkpoint(tmp_path / quantized)
    with pytest.raises(StayalignedError, match=f"{quantized}: the checkpoint is quantized"):
        place_adapter(adapter, pair["aligned"], pair["base"])


def test_plain_layers_need_a_known_shape(pair_of: PairOf, tmp_path: Path) -> None:
    aligned, _ = pair_of("llama")
    adapter = read_adapter(write_pico_adapter(tmp_path / "adapter", aligned.directory))

    def shape_of(module: str) -> tuple[int, ...] | None:
        return aligned.shape(f"{module}.weight")

    layers = plain_layers(adapter, shape_of)
    assert layers == [placed.layer for placed in place_adapter(adapter, aligned, aligned)]
    known = {layer.name for layer in layers or []} - {"model.layers.1.self_attn.q_proj"}
    assert plain_layers(adapter, lambda module: shape_of(module) if module in known else None) is None
    assert shape_of("model.layers.0.self_attn.v_proj") == (16, 32)
    for wrong in ((16, 32, 1), (32, 16), (16, 48)):
        assert plain_layers(adapter, lambda m, wrong=wrong: wrong if m.endswith("v_proj") else shape_of(m)) is None
