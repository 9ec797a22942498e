"""Names, rows and experts in the files, compared with what transformers loads; unsupported conversions are refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from stayaligned.core.errors import StayalignedError
from stayaligned.hf.placement.layers import place_adapter
from stayaligned.hf.placement.stored import StoredWeights, meta_model
from stayaligned.testing import write_pico_adapter, write_pico_checkpoint
from stayaligned.weights.adapters import read_adapter
from stayaligned.weights.checkpoints import Checkpoint, open_checkpoint
from support.checkpoints import EXPERTS, PairOf, in_memory, load, rows_of


def test_a_checkpoint_of_the_bare_model_lacks_a_prefix(pair_of: PairOf, tmp_path: Path) -> None:
    for architecture, lora in (("llama", {}), ("mixtral", {"target_modules": [], "target_parameters": EXPERTS})):
        aligned, base = pair_of(architecture)
        bare = tmp_path / f"{architecture}-bare"
        load(base.directory).model.save_pretrained(bare)
        stored = open_checkpoint(bare)
        adapter = read_adapter(write_pico_adapter(tmp_path / architecture, aligned.directory, **lora))
        full, prefixless = place_adapter(adapter, aligned, base), place_adapter(adapter, aligned, stored)
        assert [p.aligned for p in full] == [p.aligned for p in prefixless]
        for x, y in zip(full, prefixless, strict=True):
            assert y.base[0].name == x.base[0].name.removeprefix("model.")
            assert torch.equal(rows_of(base, x.base), rows_of(stored, y.base))


def test_experts_may_be_stored_separately_in_one_checkpoint_and_stacked_in_the_other(
    pair_of: PairOf, tmp_path: Path
) -> None:
    aligned, base = pair_of("qwen3_moe")
    model, stacked = load(base.directory), tmp_path / "stacked"
    stacked.mkdir()
    save_file(dict(model.state_dict()), stacked / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(base.directory / "config.json", stacked)
    lora = {"target_modules": ["q_proj"], "target_parameters": EXPERTS}
    adapter = read_adapter(write_pico_adapter(tmp_path / "adapter", aligned.directory, **lora))
    other = open_checkpoint(stacked)
    for each in place_adapter(adapter, aligned, other):
        expected = in_memory(model, each.layer.parameter, each.layer.expert)
        assert torch.equal(rows_of(other, each.base), expected)
        assert [block.expert for block in each.base] == [each.layer.expert]


def with_conversion(monkeypatch: pytest.MonkeyPatch, *transforms: Any) -> None:
    from transformers import conversion_mapping

    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda model: list(transforms))


def test_rows_are_traced_through_conversions_that_move_whole_rows(
    pair_of: PairOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stack of (gate; up) halves on disk, split on loading: parts of a 3-D tensor's matrices."""
    from transformers.core_model_loading import Chunk, Concatenate, WeightConverter

    aligned, _ = pair_of("llama")
    attention = "model.layers.0.self_attn"
    tensors = {name: aligned[name] for name in aligned}
    fused = [tensors.pop(f"{attention}.{x}_proj.weight") for x in "qo"]
    tensors[f"{attention}.qo.weight"] = torch.cat(fused)
    gate, half = tensors.pop("model.layers.0.mlp.gate_proj.weight"), 32
    tensors |= {"model.layers.0.mlp.low.weight": gate[:half], "model.layers.0.mlp.top.weight": gate[half:].clone()}
    directory = tmp_path / "fused"
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(aligned.directory / "config.json", directory)
    checkpoint = open_checkpoint(directory)
    split = WeightConverter("self_attn.qo", ["self_attn.q_proj", "self_attn.o_proj"], operations=[Chunk(0)])
    joined = WeightConverter(["mlp.low", "mlp.top"], "mlp.gate_proj", operations=[Concatenate(0)])
    with_conversion(monkeypatch, split, joined)
    names = [*(f"{attention}.{x}_proj.weight" for x in "qok"), "model.layers.0.mlp.gate_proj.weight"]
    found = StoredWeights(checkpoint, meta_model(checkpoint)).find(names)
    for name in names:
        assert torch.equal(rows_of(checkpoint, found[name][0]), aligned[name])
    assert [len(found[name][0]) for name in names] == [1, 1, 1, 2]


def conversions_that_break_rows() -> dict[str, Any]:
    from transformers.core_model_loading import ConversionOps, Interleave, PermuteForRope, Transpose

    class Flip(ConversionOps):
        """The columns backwards."""

        def convert(
            self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **_: Any
        ) -> dict[str, Any]:
            return {target_patterns[0]: input_dict[source_patterns[0]][0].flip(-1)}

    return {"rope": PermuteForRope(), "transposed": Transpose(0, 1), "interleaved": Interleave(dim=1), "flip": Flip()}


@pytest.mark.parametrize("broken", ["rope", "transposed", "interleaved", "flip"])
def test_conversions_that_break_rows_are_refused(broken: str, pair_of: PairOf, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.core_model_loading import WeightConverter

    aligned, _ = pair_of("llama", hidden_size=512, intermediate_size=16, num_attention_heads=2)
    operation = conversions_that_break_rows()[broken]
    with_conversion(monkeypatch, WeightConverter("q_proj.weight", "q_proj.weight", operations=[operation]))
    names = [f"model.layers.{i}.self_attn.{x}_proj.weight" for i in (0, 1) for x in "qv"]
    with pytest.raises(
        StayalignedError, match=f"Missing: none. Stored in another layout: {names[0]}, {names[2]}\nHint"
    ):
        StoredWeights(aligned, meta_model(aligned)).find(names)


def drop(checkpoint: Checkpoint, name: str, out: Path) -> Checkpoint:
    """A copy without one tensor."""
    out.mkdir()
    tensors = {stored: checkpoint[stored] for stored in checkpoint if stored != name}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(checkpoint.directory / "config.json", out)
    return open_checkpoint(out)


@pytest.mark.parametrize("side", ["aligned", "base"])
def test_a_missing_weight_is_named(pair_of: PairOf, tmp_path: Path, side: str) -> None:
    aligned, base = pair_of("llama")
    adapter = read_adapter(write_pico_adapter(tmp_path / "adapter", aligned.directory))
    name = "model.layers.1.self_attn.v_proj.weight"
    cut = drop({"aligned": aligned, "base": base}[side], name, tmp_path / "cut")
    pair = (cut, base) if side == "aligned" else (aligned, cut)
    with pytest.raises(StayalignedError) as caught:
        place_adapter(adapter, *pair)
    assert caught.value.message.startswith(str(cut.directory))
    assert f"Missing: {name}. Stored in another layout: none" in caught.value.message


@pytest.mark.parametrize(("lacking", "parameter"), [("w1", "gate_up_proj"), ("w2", "down_proj")])
def test_a_missing_expert_is_detected(lacking: str, parameter: str, pair_of: PairOf, tmp_path: Path) -> None:
    aligned, base = pair_of("mixtral")
    lora = {"target_modules": [], "target_parameters": EXPERTS}
    adapter = read_adapter(write_pico_adapter(tmp_path / "adapter", aligned.directory, **lora))
    cut = drop(base, f"model.layers.1.block_sparse_moe.experts.2.{lacking}.weight", tmp_path / "cut")
    with pytest.raises(StayalignedError, match=rf"another layout: model\.layers\.1\.mlp\.experts\.{parameter}\nHint"):
        place_adapter(adapter, aligned, cut)


def test_a_weight_whose_shape_differs_from_the_configuration_is_named(pair_of: PairOf, tmp_path: Path) -> None:
    aligned, _ = pair_of("llama")
    shutil.copytree(aligned.directory, tmp_path / "wider")
    config = tmp_path / "wider" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"intermediate_size": 96}))
    checkpoint = open_checkpoint(tmp_path / "wider")
    names = [f"model.layers.0.{name}.weight" for name in ("self_attn.q_proj", "mlp.up_proj")]
    with pytest.raises(StayalignedError, match=f"another layout: {names[1]}\nHint"):
        StoredWeights(checkpoint, meta_model(checkpoint)).find(names)


def test_a_name_that_a_renaming_rule_would_break_is_not_renamed(
    pair_of: PairOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As transformers does, so that a checkpoint with the names in memory loads too."""
    from transformers.core_model_loading import WeightRenaming

    aligned, _ = pair_of("llama")
    with_conversion(monkeypatch, WeightRenaming("q_proj", "query"))
    name = "model.layers.0.self_attn.q_proj.weight"
    ((block,),) = StoredWeights(aligned, meta_model(aligned)).find([name])[name]
    assert block.name == name


def test_vocabularies_may_differ(pair_of: PairOf, tmp_path: Path) -> None:
    aligned, _ = pair_of("llama")
    other = open_checkpoint(write_pico_checkpoint(tmp_path / "other", vocab_size=200))
    adapter = read_adapter(write_pico_adapter(tmp_path / "adapter", aligned.directory))
    assert len(place_adapter(adapter, aligned, other)) == 4
