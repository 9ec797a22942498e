"""`stayaligned project` on every kind of model, on several adapters, on full fine-tunes, and on invalid input."""

import json
import resource
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from stayaligned.core.files import fingerprint
from stayaligned.testing import write_pico_adapter, write_pico_checkpoint
from support.world import write_rows

Command = Callable[..., tuple[int, str]]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]

MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {}, {"target_modules": "all-linear"}),
    "tied llama, embeddings too": (
        "llama",
        {"tie_word_embeddings": True},
        {"target_modules": ["q_proj", "embed_tokens"]},
    ),
    "GPT-2": ("gpt2", {}, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "Mixtral": ("mixtral", {}, {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "Qwen3-MoE": ("qwen3_moe", {}, {"target_modules": ["o_proj"], "target_parameters": EXPERTS}),
    "gpt-oss": ("gpt_oss", {}, {"target_modules": ["v_proj"], "target_parameters": EXPERTS}),
    "DeepSeek-V3": ("deepseek_v3", {}, {"target_modules": ["o_proj", "down_proj"], "target_parameters": EXPERTS[:1]}),
    "Mamba": ("mamba", {}, {"target_modules": ["in_proj", "x_proj"]}),
    "Granite hybrid": ("granitemoehybrid", {}, {"target_modules": "all-linear"}),
    "Qwen3-Next": ("qwen3_next", {}, {"target_modules": "all-linear"}),
}


def merged(aligned: Path, adapter: Path | None) -> dict[str, torch.Tensor]:
    """Every matrix of the model with the adapter merged, in fp64: fp32 would round small updates of large weights."""
    model: Any = AutoModelForCausalLM.from_pretrained(aligned, dtype=torch.float64)
    if adapter is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return {name: p.detach().double().clone() for name, p in model.named_parameters() if p.dim() > 1}


def dense(operator: str, v: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
    if operator == "scaled_gram":
        return v @ v.T @ update / v.norm()
    u, _, qh = torch.linalg.svd(v)
    half = update - u[:, :2] @ (u[:, :2].T @ update)
    return half - half @ qh[:2].T @ qh[:2]


def allowed(operator: str, v: torch.Tensor) -> float:
    """The tolerance: 1e-5, or more if the second and third singular values are too close for fp32."""
    if operator == "scaled_gram":
        return 1e-5
    values = torch.linalg.svdvals(v).tolist()
    if len(values) < 3:
        return 1e-5
    return max(1e-5, 4 * torch.finfo(torch.float32).eps * values[0] / (values[1] - values[2]))


@pytest.mark.parametrize("name", MODELS)
def test_the_merged_weights_equal_the_dense_formula_on_every_kind_of_model(
    name: str, tmp_path: Path, command: Command
) -> None:
    architecture, model, lora = MODELS[name]
    for directory, seed in (("aligned", 0), ("base", 1)):
        write_pico_checkpoint(tmp_path / directory, architecture, seed=seed, ancestor=0 if seed else None, **model)
    write_pico_adapter(tmp_path / "adapter", tmp_path / "aligned", **lora)
    aligned, base = (merged(tmp_path / each, None) for each in ("aligned", "base"))
    before = merged(tmp_path / "aligned", tmp_path / "adapter")
    for operator, options in (("scaled_gram", []), ("complement", ["--operator", "complement", "--rank", "2"])):
        code, shown = command(
            *("project", tmp_path / "adapter", "--aligned", tmp_path / "aligned", "--base", tmp_path / "base"),
            *("--all", "--out", tmp_path / operator, *options),
        )
        assert code == 0, shown
        after = merged(tmp_path / "aligned", tmp_path / operator)
        changed = [key for key in aligned if not torch.equal(before[key], aligned[key])]
        assert changed
        # Stored as (in, out): Conv1D, gpt-oss' experts, and embeddings, which map indices to outputs.
        turned = architecture in ("gpt2", "gpt_oss")
        layers = 0
        for key in aligned:
            matrices = aligned[key].unsqueeze(0) if aligned[key].dim() == 2 else aligned[key]
            turn = (turned and ("experts" in key or architecture == "gpt2")) or "embed_tokens" in key
            for expert in range(len(matrices)):
                pick = (expert,) if aligned[key].dim() == 3 else ()
                parts = [t[key][pick] for t in (aligned, base, before, after)]
                origin, unaligned, tuned, patched = [part.T for part in parts] if turn else parts
                if key not in changed:
                    assert torch.equal(patched, origin), key
                    continue
                layers += 1
                expected = dense(operator, origin - unaligned, tuned - origin)
                error = (patched - origin - expected).norm() / (tuned - origin).norm()
                assert error <= allowed(operator, origin - unaligned), (operator, key, expert, float(error))
        assert f"{layers} of {layers} layers changed" in shown
        assert json.loads((tmp_path / operator / "adapter_config.json").read_text()) == json.loads(
            (tmp_path / "adapter" / "adapter_config.json").read_text()
        )


def test_a_legacy_adapter_of_experts_keeps_its_layout(tmp_path: Path, command: Command) -> None:
    for directory, seed in (("aligned", 0), ("base", 1)):
        write_pico_checkpoint(tmp_path / directory, "mixtral", seed=seed, ancestor=0 if seed else None)
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    stored = load_file(tmp_path / "aligned" / "model.safetensors")
    for name, weight in stored.items():
        if name.endswith((".w1.weight", ".w2.weight", ".w3.weight")):
            key = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(2, weight.shape[1], generator=generator)
            tensors[f"{key}.lora_B.weight"] = torch.randn(weight.shape[0], 2, generator=generator)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "bias": "none"}
    (tmp_path / "adapter").mkdir()
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors", metadata={"format": "pt"})
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        json.dumps({**config, "target_modules": ["w1", "w2", "w3"]})
    )
    code, shown = command(
        *("project", tmp_path / "adapter", "--aligned", tmp_path / "aligned", "--base", tmp_path / "base"),
        *("--all", "--out", tmp_path / "out"),
    )
    assert code == 0, shown
    after = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert after.keys() == tensors.keys()
    base = load_file(tmp_path / "base" / "model.safetensors")
    for key, b in after.items():
        if key.endswith("lora_B.weight"):
            name = key.removeprefix("base_model.model.").replace(".lora_B.weight", ".weight")
            v = (stored[name] - base[name]).double()
            torch.testing.assert_close(b.double(), v @ v.T @ tensors[key].double() / v.norm(), rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`aligned`, `base`, three adapters `fleet/a0` … and a full fine-tune `tuned`."""
    root = tmp_path_factory.mktemp("world")
    write_pico_checkpoint(root / "aligned", seed=0, shard_size="60KB")
    write_pico_checkpoint(root / "base", seed=1, ancestor=0)
    shutil.copytree(root / "aligned", root / "tuned")
    for shard in (root / "tuned").glob("*.safetensors"):
        save_file({k: v + 0.01 * v.sin() for k, v in load_file(shard).items()}, shard, metadata={"format": "pt"})
    for seed in range(3):
        write_pico_adapter(root / "fleet" / f"a{seed}", root / "aligned", seed=seed, r=2)
    return root


def arguments(world: Path, out: Path, *options: object, adapter: Path | None = None) -> list[object]:
    source = adapter or world / "fleet" / "a0"
    return ["project", source, "--aligned", world / "aligned", "--base", world / "base", "--out", out, *options]


def test_one_adapter_is_written_with_its_record(world: Path, tmp_path: Path, command: Command) -> None:
    for name, options in {
        "c": ["--lowest", "2"],
        "o": ["--all", "--operator", "orthogonal", "--rank", "4"],
        "e": ["--threshold", "2", "--operator", "orthogonal", "--energy", "0.5"],
        "k": ["--all", "--operator", "complement", "--rank", "4", "--side", "left"],
        "s": ["--all", "--operator", "complement", "--rank", "4", "--control", "shrink"],
        "r": ["--all", "--control", "random"],
        "d": ["--lowest", "3", "--control", "drop"],
        "0": ["--lowest", "0"],
    }.items():
        code, shown = command(*arguments(world, tmp_path / name, *options))
        assert code == 0, shown
        record = json.loads((tmp_path / name / "projection.json").read_text())
        changed = sum(layer["selected"] for layer in record["layers"])
        assert f"{changed} of 4 layers changed" in shown
        assert changed == (int(options[1]) if options[0] == "--lowest" else 4)
        assert record["command"][:2] == ["stayaligned", "project"]


def test_several_adapters_are_written_into_directories_with_their_names(
    world: Path, tmp_path: Path, command: Command
) -> None:
    adapters = [world / "fleet" / f"a{i}" for i in range(3)]
    shutil.copytree(adapters[0], tmp_path / "other" / "a0")
    code, shown = command(
        *("project", *adapters, tmp_path / "other" / "a0", "--aligned", world / "aligned", "--base", world / "base"),
        *("--out", tmp_path / "out", "--all"),
    )
    assert code == 0, shown
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "fleet-a0",
        "fleet-a1",
        "fleet-a2",
        "other-a0",
    ]
    for name in ("fleet-a0", "other-a0"):
        assert (tmp_path / "out" / name / "adapter_model.safetensors").is_file()
    code, shown = command(*arguments(world, tmp_path / "twice", adapters[0], "--all"))
    assert code == 2
    assert "given twice" in shown


def test_a_full_fine_tune_is_written_as_a_model(world: Path, tmp_path: Path, command: Command) -> None:
    code, shown = command(*arguments(world, tmp_path / "out", "--all", adapter=world / "tuned"))
    assert code == 0, shown
    assert "14 of 14 layers changed" in shown
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_a_scan_prints_and_plots_and_changes_nothing(world: Path, tmp_path: Path, command: Command) -> None:
    before = fingerprint(world / "fleet")
    code, shown = command(*arguments(world, tmp_path / "scan", "--scan"))
    assert code == 0, shown
    assert "threshold" in shown
    assert sorted(path.name for path in (tmp_path / "scan").iterdir()) == ["scan.json", "scan.svg"]
    code, shown = command(*arguments(world, tmp_path / "scans", "--scan", world / "fleet" / "a1"))
    assert code == 0, shown
    assert sorted(path.name for path in (tmp_path / "scans").iterdir()) == ["a0", "a1"]
    assert fingerprint(world / "fleet") == before


@pytest.mark.parametrize(
    "selection",
    [[], ["--all", "--lowest", "1"], ["--threshold", "0.1", "--all"], ["--scan", "--all"]],
    ids=["none", "two", "other two", "scan and all"],
)
def test_project_requires_exactly_one_selection_of_layers(
    world: Path, tmp_path: Path, command: Command, selection: list[str]
) -> None:
    code, shown = command(*arguments(world, tmp_path / "n", *selection))
    assert code == 2
    assert "exactly one of --threshold T, --lowest K and --all" in shown


@pytest.mark.parametrize(
    "models", [[], ["--aligned", "x"], ["--base", "x"], ["--subspace", "f", "--base", "x"]], ids=" ".join
)
def test_project_requires_a_source_of_the_alignment_direction(
    world: Path, tmp_path: Path, command: Command, models: list[str]
) -> None:
    code, shown = command("project", world / "fleet" / "a0", "--all", "--out", tmp_path / "n", *models)
    assert code == 2
    assert "--aligned and --base, or --subspace" in shown


def change(directory: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = next(directory.glob("*.safetensors"))
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


Q, V = "model.layers.1.self_attn.q_proj.weight", "model.layers.0.self_attn.v_proj.weight"


def truncated_shard(root: Path) -> None:
    shard = sorted((root / "aligned").glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-100])


def missing_index_entry(root: Path) -> None:
    path = root / "aligned" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"][Q]
    path.write_text(json.dumps(index))


def index_names_what_is_not_there(root: Path) -> None:
    path = root / "aligned" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][Q] = index["weight_map"]["model.embed_tokens.weight"]
    path.write_text(json.dumps(index))


def identical(root: Path) -> None:
    shutil.rmtree(root / "base")
    shutil.copytree(root / "aligned", root / "base")


def swapped(root: Path) -> None:
    for old, new in (("aligned", "x"), ("base", "aligned"), ("x", "base")):
        (root / old).rename(root / new)
    path = root / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": str(root / "base")}))


def other_shape(root: Path) -> None:
    shutil.rmtree(root / "base")
    write_pico_checkpoint(root / "base", num_key_value_heads=4)


def nan_weight(root: Path) -> None:
    change(root / "base", lambda tensors: tensors[V].fill_(float("nan")))


def inf_weight(root: Path) -> None:
    change(root / "base", lambda tensors: tensors[V][0, 0].fill_(float("inf")))


def quantized_weight(root: Path) -> None:
    change(root / "base", lambda tensors: tensors.update({V: tensors[V].to(torch.int8)}))


def quantized_checkpoint(root: Path) -> None:
    path = root / "aligned" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": {"quant_method": "bnb"}}))


def pickled_model(root: Path) -> None:
    (root / "base" / "model.safetensors").rename(root / "base" / "pytorch_model.bin")


def pickled_adapter(root: Path) -> None:
    (root / "adapter" / "adapter_model.safetensors").rename(root / "adapter" / "adapter_model.bin")


def empty_adapter(root: Path) -> None:
    save_file({}, root / "adapter" / "adapter_model.safetensors", metadata={"format": "pt"})


def nan_adapter(root: Path) -> None:
    change(root / "adapter", lambda tensors: next(iter(tensors.values())).fill_(float("nan")))


def adapter_lacks_a_layer(root: Path) -> None:
    change(
        root / "adapter", lambda tensors: [tensors.pop(key) for key in list(tensors) if "layers.1.self_attn.q" in key]
    )


def adapter_of_another_model(root: Path) -> None:
    write_pico_checkpoint(root / "x", hidden_size=64)
    shutil.rmtree(root / "adapter")
    write_pico_adapter(root / "adapter", root / "x")


def pissa(root: Path) -> None:
    path = root / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "init_lora_weights": "pissa_niter_4"}))


def dora(root: Path) -> None:
    path = root / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_dora": True}))


def output_exists(root: Path) -> None:
    (root / "out").mkdir()


BROKEN: list[tuple[Callable[[Path], None], tuple[str, ...]]] = [
    (truncated_shard, ("aligned/model-00001", "download or save")),
    (missing_index_entry, ("layers.1.self_attn.q_proj",)),
    (index_names_what_is_not_there, ("layers.1.self_attn.q_proj", "has no tensor")),
    (identical, ("hold the same weights",)),
    (swapped, ("look swapped", "base")),
    (other_shape, ("v_proj", "32×32", "16×32")),
    (nan_weight, ("layers.0.self_attn.v_proj", "NaN or infinity")),
    (inf_weight, ("layers.0.self_attn.v_proj", "NaN or infinity")),
    (quantized_weight, ("layers.0.self_attn.v_proj", "I8", "bf16")),
    (quantized_checkpoint, ("aligned", "quantized")),
    (pickled_model, ("base holds neither", "save_pretrained")),
    (pickled_adapter, ("adapter has no adapter_model.safetensors", "pickled")),
    (empty_adapter, ("adapter",)),
    (nan_adapter, ("lora_A", "holds NaN or infinity")),
    (adapter_lacks_a_layer, ("Missing", "layers.1.self_attn.q_proj")),
    (adapter_of_another_model, ("q_proj",)),
    (pissa, ("pissa_niter_4", "path_initial_model_for_weight_conversion")),
    (dora, ("use_dora",)),
    (output_exists, ("exists already",)),
]


@pytest.mark.parametrize(("damage", "expected"), BROKEN, ids=[damage.__name__ for damage, _ in BROKEN])
def test_bad_input_is_one_error_that_names_it_and_leaves_no_output(
    world: Path, tmp_path: Path, command: Command, damage: Callable[[Path], None], expected: tuple[str, ...]
) -> None:
    for name in ("aligned", "base"):
        shutil.copytree(world / name, tmp_path / name)
    shutil.copytree(world / "fleet" / "a0", tmp_path / "adapter")
    damage(tmp_path)
    before = fingerprint(tmp_path)
    code, shown = command(*arguments(tmp_path, tmp_path / "out", "--all", adapter=tmp_path / "adapter"))
    assert code == 2, shown
    assert shown.startswith("error: ")
    assert shown.count("error: ") == 1
    assert "Traceback" not in shown
    for text in expected:
        assert text in shown
    assert fingerprint(tmp_path) == before


def test_a_full_disk_is_one_error_that_leaves_the_input_and_no_output(
    world: Path, tmp_path: Path, command: Command
) -> None:
    before, (soft, hard) = fingerprint(world), resource.getrlimit(resource.RLIMIT_FSIZE)
    sources = {"one": [world / "fleet" / "a0"], "full": [world / "tuned"], "fleet": sorted((world / "fleet").iterdir())}
    for name, (first, *others) in sources.items():
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # writing more than 4 KiB fails, as on a full disk
            code, shown = command(*arguments(world, tmp_path / name, "--all", *others, adapter=first))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert code == 2, shown
        assert "can't be written" in shown
        assert "Traceback" not in shown
        assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert fingerprint(world) == before


def test_a_scan_overwrites_nothing_and_reads_adapters_only(world: Path, tmp_path: Path, command: Command) -> None:
    code, shown = command(*arguments(world, world / "fleet" / "a1", "--scan"))
    assert (code, "exists already" in shown) == (2, True)
    code, shown = command(*arguments(world, tmp_path / "scan", "--scan", adapter=world / "tuned"))
    assert (code, "whole model" in shown) == (2, True)
    code, shown = command(*arguments(world, tmp_path / "out", "--all", world / "tuned"))
    assert (code, "whole model" in shown) == (2, True)
    code, shown = command(*arguments(world, tmp_path / "out", "--all", adapter=tmp_path / "absent"))
    assert (code, "absent: no such directory" in shown) == (2, True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "setting", [{"target_modules": "("}, {"rank_pattern": ["q"]}, {"lora_alpha": "x"}, {"r": None}], ids=str
)
def test_an_invalid_adapter_configuration_is_one_error(
    world: Path, tmp_path: Path, command: Command, setting: dict[str, Any]
) -> None:
    shutil.copytree(world / "fleet" / "a0", tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **setting}))
    code, shown = command(*arguments(world, tmp_path / "out", "--all", adapter=tmp_path / "adapter"))
    assert code == 2, shown
    assert "Traceback" not in shown
    assert str(tmp_path / "adapter") in shown


def test_invalid_settings_are_one_error(world: Path, tmp_path: Path, command: Command) -> None:
    for options in (
        ["--threshold", "nan"],
        ["--all", "--energy", "2", "--operator", "orthogonal"],
        ["--all", "--rank", "0"],
    ):
        code, shown = command(*arguments(world, tmp_path / "out", *options))
        assert code == 2, shown
        assert "Traceback" not in shown
    assert not list(tmp_path.iterdir())


def test_an_adapter_of_a_third_model_and_another_aligned_model_than_the_subspace_files_is_refused(
    world: Path, tmp_path: Path, command: Command
) -> None:
    shutil.copytree(world / "fleet" / "a0", tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": str(world / "tuned")}))
    code, shown = command(*arguments(world, tmp_path / "out", "--all", adapter=tmp_path / "adapter"))
    assert code == 2, shown
    assert "tuned, not on " in shown
    assert "--allow-mismatch" in shown
    code, shown = command(
        *arguments(world, tmp_path / "out", "--all", "--allow-mismatch", adapter=tmp_path / "adapter")
    )
    assert code == 0, shown
    assert "tuned, not on " in shown
    assert json.loads((tmp_path / "out" / "projection.json").read_text())["notes"]
    file = tmp_path / "v.safetensors"
    code, shown = command(
        *("subspace", "build", "--aligned", world / "aligned", "--base", world / "base", "--rank", "4", "--out", file)
    )
    assert code == 0, shown
    code, shown = command(
        *("project", world / "fleet" / "a0", "--subspace", file, "--aligned", world / "tuned", "--all"),
        *("--out", tmp_path / "out2"),
    )
    assert (code, "is not the aligned model" in shown) == (2, True)


def test_another_vocabulary_is_refused_only_if_the_head_is_targeted(
    world: Path, tmp_path: Path, command: Command
) -> None:
    other: Any = AutoModelForCausalLM.from_pretrained(world / "base")
    other.resize_token_embeddings(300)
    other.save_pretrained(tmp_path / "base")
    models = ["--aligned", world / "aligned", "--base", tmp_path / "base"]
    adapter = world / "fleet" / "a0"
    code, shown = command("project", adapter, *models, "--all", "--out", tmp_path / "out")
    assert code == 0, shown
    head = write_pico_adapter(tmp_path / "head", world / "aligned", target_modules=["lm_head"])
    code, shown = command("project", head, *models, "--all", "--out", tmp_path / "out2")
    assert code == 2
    assert "lm_head" in shown
    assert "261×32 against 300×32" in shown


def test_an_untrained_adapter_is_an_error(world: Path, tmp_path: Path, command: Command) -> None:
    shutil.copytree(world / "fleet" / "a0", tmp_path / "adapter")
    change(tmp_path / "adapter", lambda tensors: [t.zero_() for key, t in tensors.items() if "lora_B" in key])
    code, shown = command(*arguments(world, tmp_path / "out", "--all", adapter=tmp_path / "adapter"))
    assert code == 2, shown
    assert "the update is zero in all 4 layers" in shown
    assert not (tmp_path / "out").exists()


def test_an_unavailable_device_is_refused(world: Path, tmp_path: Path, command: Command) -> None:
    for device in ("cuda:99", "toaster"):
        code, shown = command(*arguments(world, tmp_path / "out", "--all", "--device", device))
        assert code == 2
        assert device in shown
        assert "Traceback" not in shown


def test_any_other_patch_is_named_with_its_settings(world: Path, tmp_path: Path, command: Command) -> None:
    write_rows(tmp_path / "safe.jsonl", [{"prompt": "flarn a zorb", "completion": "I cannot"}])
    models = ["--aligned", str(world / "aligned"), "--base", str(world / "base")]
    other = write_pico_adapter(tmp_path / "other", world / "aligned", seed=5)
    code, shown = command(
        *("project", str(world / "fleet" / "a0"), "--defense", "{name: csulora, rank: 3}", *models, "--out"),
        str(tmp_path / "csulora"),
    )
    assert code == 0, shown
    record = json.loads((tmp_path / "csulora" / "projection.json").read_text())
    assert (record["defense"]["name"], record["defense"]["rank"]) == ("csulora", 3)
    code, shown = command(
        *("project", str(world / "fleet" / "a0"), str(other), "--defense", "{name: one_shot, learning_rate: 0.01}"),
        *("--aligned", str(world / "aligned"), "--alignment-data", str(tmp_path / "safe.jsonl")),
        *("--out", str(tmp_path / "both")),
    )
    assert code == 0, shown
    record = json.loads((tmp_path / "both" / "other" / "projection.json").read_text())
    assert record["inputs"]["alignment_data"]["ref"] == "1 rows"
    assert "base" not in record["inputs"]
    assert record["changed"] == len(record["layers"])
    code, shown = command(
        *("project", str(world / "fleet" / "a0"), "--defense", f"{{name: resta, adapter: {other}}}", "--aligned"),
        *(str(world / "aligned"), "--out", str(tmp_path / "resta")),
    )
    assert code == 0, shown
    record = json.loads((tmp_path / "resta" / "projection.json").read_text())
    assert record["inputs"]["second_adapter"] == {"ref": str(other), "sha256": fingerprint(other)}
    assert "norm after the patch is that of the sum" in " ".join(record["notes"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--defense", "csulora", "--all"], "--all: not with --defense"),
        (["--defense", "csulora", "--rank", "3"], "--rank: not with --defense"),
        (["--defense", "lisa"], "acts during fine-tuning"),
        (["--defense", "{name: csulora, rnak: 3}"], "rnak"),
        (["--defense", "one_shot"], "needs alignment data"),
        (["--defense", "csulora"], "source of the alignment direction"),
        (["--defense", "one_shot", "--aligned", "", "--alignment-data", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_a_named_patch_that_lacks_something_is_one_error(
    world: Path, tmp_path: Path, command: Command, options: list[str], message: str
) -> None:
    options = [str(world / "aligned") if option == "" else option for option in options]
    code, shown = command("project", str(world / "fleet" / "a0"), *options, "--out", str(tmp_path / "out"))
    assert code == 2
    assert message in shown
    assert not (tmp_path / "out").exists()
