"""Patching full fine-tunes of tiny checkpoints, compared with W_aligned + P(W_ft - W_aligned) in fp64."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from stayaligned.core.errors import StayalignedError
from stayaligned.defenses import DEFENSES, ModelPair
from stayaligned.defenses.patching.directories import PROJECTION_FILE, patch_directory, read_projection
from stayaligned.defenses.patching.subspace import build_subspace
from stayaligned.testing import write_pico_checkpoint
from stayaligned.weights.checkpoints import open_checkpoint

Q = "model.layers.0.self_attn.q_proj.weight"
ALL = {"name": "safe_lora", "all_layers": True}
SPECS: dict[str, dict[str, Any]] = {
    "scaled_gram": ALL,
    "orthogonal": {**ALL, "operator": "orthogonal", "rank": 3},
    "complement": {"name": "complement", "rank": 3},
    "left": {"name": "complement", "rank": 3, "side": "left"},
    "drop": {"name": "drop", "like": ALL},
    "shrink": {"name": "shrink", "like": ALL, "factor": 0.25},
}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, three shards": ("llama", {"shard_size": "60KB"}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "gpt2, stored (in, out)": ("gpt2", {}),
}


def make(root: Path, architecture: str, **settings: Any) -> ModelPair:
    """`aligned`, `base`, and `tuned`: aligned plus a small change of everything."""
    for name, seed in (("aligned", 0), ("base", 1)):
        write_pico_checkpoint(root / name, architecture, seed=seed, ancestor=0 if seed else None, **settings)
    shutil.copytree(root / "aligned", root / "tuned")
    generator = torch.Generator().manual_seed(5)
    for shard in (root / "tuned").glob("*.safetensors"):
        tensors = {
            name: value + 0.05 * torch.randn(value.shape, generator=generator)
            for name, value in load_file(shard).items()
        }
        save_file(tensors, shard, metadata={"format": "pt"})
    return ModelPair(root / "aligned", root / "base")


def weights(directory: Path) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(directory)
    return {name: checkpoint[name] for name in checkpoint}


def expected(kind: str, v: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
    u, _, qh = torch.linalg.svd(v)
    left, right = u[:, :3] @ u[:, :3].T, qh[:3].T @ qh[:3]
    if kind == "scaled_gram":
        return v @ v.T @ update / v.norm()
    if kind == "orthogonal":
        return left @ update
    if kind == "left":
        return update - left @ update
    if kind == "complement":
        half = update - left @ update
        return half - half @ right
    return update * {"drop": 0.0, "shrink": 0.25}[kind]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_selected_weights_are_aligned_plus_the_projected_update_and_the_rest_is_copied(
    tmp_path: Path, architecture: str
) -> None:
    kind, settings = ARCHITECTURES[architecture]
    models = make(tmp_path, kind, **settings)
    aligned, base, tuned = (weights(tmp_path / name) for name in ("aligned", "base", "tuned"))
    before = {path.name: path.read_bytes() for path in (tmp_path / "tuned").iterdir()}
    for name, spec in SPECS.items():
        reports = patch_directory(tmp_path / "tuned", tmp_path / name, DEFENSES.parse(spec), models)
        after = weights(tmp_path / name)
        changed = {f"{report.module}.weight" for report in reports}
        changed = {key if key in after else key.removeprefix("transformer.") for key in changed}
        assert len(reports) == (8 if kind == "gpt2" else 14)
        assert changed < after.keys() == tuned.keys()
        for key, value in after.items():
            if key not in changed:
                assert torch.equal(value, tuned[key]), key
                continue
            parts = [tensors[key].double() for tensors in (aligned, base, tuned)]
            origin, unaligned, finetuned = [part.T for part in parts] if kind == "gpt2" else parts
            update = finetuned - origin
            image = origin + expected(name, origin - unaligned, update)
            found = value.double().T if kind == "gpt2" else value.double()
            assert (found - image).norm() <= 1e-5 * update.norm() + 1e-6 * origin.norm(), key
        assert list(read_projection(tmp_path / name / PROJECTION_FILE).layers) == reports
        for path in (tmp_path / name).iterdir():
            if path.suffix != ".safetensors" and path.name != PROJECTION_FILE:
                assert path.read_bytes() == before[path.name]
        AutoModelForCausalLM.from_pretrained(tmp_path / name)
    assert {path.name: path.read_bytes() for path in (tmp_path / "tuned").iterdir()} == before


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("full")
    make(root, "llama")
    return root


def patched(world: Path, out: Path, spec: Any, models: ModelPair | None = None) -> Any:
    pair = models or ModelPair(world / "aligned", world / "base")
    return patch_directory(world / "tuned", out, DEFENSES.parse(spec), pair)


def test_dropping_every_layer_leaves_the_aligned_linear_weights_bit_for_bit(world: Path, tmp_path: Path) -> None:
    reports = patched(world, tmp_path / "out", {"name": "drop", "like": ALL})
    after, aligned = weights(tmp_path / "out"), weights(world / "aligned")
    for report in reports:
        assert torch.equal(after[f"{report.module}.weight"], aligned[f"{report.module}.weight"])


def test_threshold_and_lowest_change_the_same_layers_and_only_those(world: Path, tmp_path: Path) -> None:
    every = patched(world, tmp_path / "every", ALL)
    ordered = sorted(report.similarity for report in every)
    by_count = patched(world, tmp_path / "count", {"name": "safe_lora", "lowest": 4})
    by_value = patched(world, tmp_path / "value", {"name": "safe_lora", "threshold": ordered[4]})
    assert by_count == by_value
    assert sum(report.selected for report in by_count) == 4
    one, other, tuned = (weights(tmp_path / "count"), weights(tmp_path / "value"), weights(world / "tuned"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    moved = {name.removesuffix(".weight") for name in one if not torch.equal(one[name], tuned[name])}
    assert moved == {report.module for report in by_count if report.selected}
    assert [report for report in by_count if report.selected] == [report for report in every if report.module in moved]


def test_half_precision_checkpoints_keep_their_type(world: Path, tmp_path: Path) -> None:
    for name in ("aligned", "base", "tuned"):
        shutil.copytree(world / name, tmp_path / name)
        shard = tmp_path / name / "model.safetensors"
        save_file({k: v.bfloat16() for k, v in load_file(shard).items()}, shard, metadata={"format": "pt"})
    models = ModelPair(tmp_path / "aligned", tmp_path / "base")
    reports = patched(tmp_path, tmp_path / "out", {"name": "complement", "rank": 2}, models)
    after = weights(tmp_path / "out")
    assert {value.dtype for value in after.values()} == {torch.bfloat16}
    assert all(report.selected for report in reports)


def test_a_checkpoint_of_another_shape_is_refused_without_output(world: Path, tmp_path: Path) -> None:
    other = write_pico_checkpoint(tmp_path / "other", seed=3, intermediate_size=48)
    with pytest.raises(StayalignedError, match="mlp") as caught:
        patch_directory(other, tmp_path / "out", DEFENSES.parse(ALL), ModelPair(world / "aligned", world / "base"))
    assert "fine-tuned" in caught.value.message
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight", Q])
def test_a_diverged_model_is_refused_without_output_wherever_it_is_not_finite(
    world: Path, tmp_path: Path, name: str
) -> None:
    shutil.copytree(world / "tuned", tmp_path / "tuned")
    shard = tmp_path / "tuned" / "model.safetensors"
    tensors = load_file(shard)
    tensors[name].view(-1)[-1] = torch.nan
    save_file(tensors, shard, metadata={"format": "pt"})
    models = ModelPair(world / "aligned", world / "base")
    with pytest.raises(StayalignedError, match="NaN or infinity"):
        patch_directory(tmp_path / "tuned", tmp_path / "out", DEFENSES.parse(ALL), models)
    assert [path.name for path in tmp_path.iterdir()] == ["tuned"]


def test_identical_aligned_and_base_are_refused_without_output(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "aligned", tmp_path / "same")
    with pytest.raises(StayalignedError):
        patched(world, tmp_path / "out", {"name": "complement"}, ModelPair(world / "aligned", tmp_path / "same"))
    assert [path.name for path in tmp_path.iterdir()] == ["same"]


def test_swapped_models_are_detected_by_their_weights(world: Path, tmp_path: Path) -> None:
    with pytest.raises(StayalignedError, match="look swapped"):
        patched(world, tmp_path / "out", ALL, ModelPair(world / "base", world / "aligned"))
    assert not list(tmp_path.iterdir())


def test_a_second_set_of_weights_that_would_not_load_is_not_copied(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "tuned", tmp_path / "tuned")
    (tmp_path / "tuned" / "model.safetensors.index.json").write_text('{"weight_map": {"x": "other.safetensors"}}')
    for name in ("other.safetensors", "pytorch_model.bin", "optimizer.pt"):
        (tmp_path / "tuned" / name).write_bytes(b"stale")
    patched(tmp_path, tmp_path / "out", {"name": "drop", "like": ALL}, ModelPair(world / "aligned", world / "base"))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert not names & {"other.safetensors", "pytorch_model.bin", "optimizer.pt"}
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    aligned: Any = AutoModelForCausalLM.from_pretrained(world / "aligned")
    key = "model.layers.0.self_attn.q_proj"
    assert torch.equal(loaded.get_submodule(key).weight, aligned.get_submodule(key).weight)


def test_the_record_names_the_three_checkpoints(world: Path, tmp_path: Path) -> None:
    patched(world, tmp_path / "out", ALL)
    record = json.loads((tmp_path / "out" / PROJECTION_FILE).read_text())
    assert sorted(record["inputs"]) == ["aligned", "base", "finetuned"]


def test_a_defense_without_full_weights_refuses_them(world: Path, tmp_path: Path) -> None:
    from stayaligned.defenses import PatchDefense, PatchedAdapter

    class Adapters(PatchDefense):
        """Only adapters."""

        name = "adapters"

        def patch(self, adapter: Any, models: ModelPair) -> PatchedAdapter:
            raise NotImplementedError

    with pytest.raises(StayalignedError, match="patches LoRA adapters"):
        patch_directory(world / "tuned", tmp_path / "out", Adapters(), ModelPair(world / "aligned", world / "base"))
    assert not list(tmp_path.iterdir())


def test_a_subspace_file_of_full_rank_replaces_the_base(world: Path, tmp_path: Path) -> None:
    file = tmp_path / "v.safetensors"
    build_subspace(world / "aligned", world / "base", file, rank=32)
    for name, spec in (("c", ALL), ("k", {"name": "complement", "rank": 3}), ("l", {"name": "safe_lora", "lowest": 3})):
        with_base = patched(world, tmp_path / f"{name}-base", spec)
        with_file = patched(world, tmp_path / f"{name}-file", spec, ModelPair(world / "aligned", None, file))
        assert [r.selected for r in with_base] == [r.selected for r in with_file]
        one, other = weights(tmp_path / f"{name}-base"), weights(tmp_path / f"{name}-file")
        for key in one:
            torch.testing.assert_close(one[key], other[key], atol=1e-5, rtol=1e-5)
    with pytest.raises(StayalignedError, match="is not the aligned model"):
        patched(world, tmp_path / "out", ALL, ModelPair(world / "base", None, file))
    with pytest.raises(StayalignedError, match="needs the aligned model"):
        patched(world, tmp_path / "out", ALL, ModelPair(None, None, file))


@pytest.mark.parametrize("match", ["count", "norm", "kind"])
def test_other_layers_of_a_full_fine_tune_are_dropped_as_a_whole(tmp_path: Path, match: str) -> None:
    models = make(tmp_path, "llama")
    like = {"name": "safe_lora", "lowest": 4}
    spec = {"name": "drop_other", "like": like, "match": match, "seed": 2}
    reports = patch_directory(tmp_path / "tuned", tmp_path / "out", DEFENSES.parse(spec), models)
    chosen = patch_directory(tmp_path / "tuned", tmp_path / "like", DEFENSES.parse(like), models)
    aligned, tuned, out = (weights(tmp_path / name) for name in ("aligned", "tuned", "out"))
    dropped = {report.module for report in reports if report.selected}
    for name, value in out.items():
        expected_value = aligned[name] if name.removesuffix(".weight") in dropped else tuned[name]
        torch.testing.assert_close(value, expected_value, rtol=0, atol=1e-6)
    left, removed = (
        sum(r.update_norm**2 for r in reports if (r.module in dropped) == is_dropped) for is_dropped in (False, True)
    )
    like_removed = sum(r.update_norm**2 for r in chosen if r.selected)
    if match == "norm":  # to one layer
        assert abs(removed - like_removed) <= max(r.update_norm**2 for r in reports)
    else:
        assert len(dropped) == 4
    if match == "kind":
        kinds = [sorted(r.module.rpartition(".")[2] for r in each if r.selected) for each in (reports, chosen)]
        assert kinds[0] == kinds[1]
        assert left**0.5 == pytest.approx((left + removed - like_removed) ** 0.5, rel=0.02)
