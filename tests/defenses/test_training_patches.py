"""Patches that train: compared with a hand-written loop, and with sums of dense updates."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from stayaligned.core.errors import StayalignedError
from stayaligned.data.sources import read_examples
from stayaligned.defenses import DEFENSES, ModelPair
from stayaligned.defenses.patching.directories import patch_directory, read_projection
from stayaligned.hf.features import encode_examples
from stayaligned.hf.models import load_tokenizer
from stayaligned.hf.training.adapters import train_adapter
from stayaligned.testing import write_pico_adapter, write_pico_checkpoint
from stayaligned.weights.adapters import Adapter, read_adapter, write_adapter
from stayaligned.weights.concatenation import layers_by_module
from support.world import write_world

LORA: dict[str, Any] = {"r": 2, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_world(tmp_path_factory.mktemp("world"))
    write_pico_adapter(root / "adapter", root / "aligned", **LORA)
    write_pico_adapter(root / "other", root / "aligned", seed=1, **{**LORA, "r": 3})
    return root


@pytest.fixture(scope="module")
def models(world: Path) -> ModelPair:
    rows = read_examples(str(world / "alignment.jsonl"), origin="alignment")
    return ModelPair(world / "aligned", world / "base", alignment_examples=rows)


def updates(adapter: Adapter) -> dict[str, torch.Tensor]:
    found = {name: adapter.factors(layer) for name, layer in layers_by_module(adapter).items()}
    return {name: value.scaling * value.b.double() @ value.a.double() for name, value in found.items()}


def assert_near(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert (value - expected[name]).norm() <= 1e-6 * max(1.0, float(expected[name].norm())), name


def patch(world: Path, models: ModelPair, out: Path, **spec: Any) -> Adapter:
    patch_directory(world / "adapter", out, DEFENSES.parse(spec), models)
    return read_adapter(out)


def test_one_shot_equals_a_hand_written_loop_on_one_row(world: Path, models: ModelPair, tmp_path: Path) -> None:
    epochs, rate = 4, 1e-2
    patched = patch(world, models, tmp_path / "out", name="one_shot", epochs=epochs, learning_rate=rate)
    by_hand: Any = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(world / "aligned"), world / "adapter", is_trainable=True
    )
    (row,) = encode_examples(load_tokenizer(world / "aligned"), models.alignment_examples[:1], 1024)
    ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
    weights = [parameter for parameter in by_hand.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)
    for step in range(epochs):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / epochs)
        by_hand(input_ids=ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    expected = {
        key.replace(".default", ""): value.detach() for key, value in by_hand.named_parameters() if "lora_" in key
    }
    assert expected.keys() == patched.tensors.keys()
    for key, value in expected.items():
        assert torch.allclose(patched.tensors[key], value, atol=1e-6), key
    assert patched.config == read_adapter(world / "adapter").config
    record = read_projection(tmp_path / "out" / "projection.json")
    before, after = updates(read_adapter(world / "adapter")), updates(patched)
    for layer in record.layers:
        one, two = before[layer.module], after[layer.module]
        assert layer.similarity == pytest.approx(float((one * two).sum() / one.norm() / two.norm()), abs=1e-6)
        assert layer.shrinkage == pytest.approx(float(two.norm() / one.norm()), rel=1e-6)
        assert layer.selected


def test_safe_merge_is_the_weighted_sum_in_the_selected_layers(world: Path, models: ModelPair, tmp_path: Path) -> None:
    spec = {"name": "safe_merge", "adapter": str(world / "other"), "lowest": 2, "weight": 0.3}
    own, safe = updates(read_adapter(world / "adapter")), updates(read_adapter(world / "other"))
    rows_are_not_needed = replace(models, alignment_examples=())
    patched = patch(world, rows_are_not_needed, tmp_path / "out", **spec)
    record = read_projection(tmp_path / "out" / "projection.json")
    chosen = {layer.module for layer in record.layers if layer.selected}
    assert len(chosen) == 2
    assert_near(updates(patched), {n: 0.7 * own[n] + 0.3 * safe[n] if n in chosen else own[n] for n in own})
    assert patched.config["r"] == 5
    for layer in record.layers:
        expected = float(updates(patched)[layer.module].norm() / own[layer.module].norm())
        assert layer.shrinkage == pytest.approx(expected, rel=1e-5)
    assert any("norm after the patch is that of the sum" in note for note in record.notes)
    everything = patch(world, models, tmp_path / "w1", **{**spec, "lowest": None, "all_layers": True, "weight": 1})
    assert_near(updates(everything), safe)
    nothing = patch(world, models, tmp_path / "w0", **{**spec, "weight": 0})
    assert_near(updates(nothing), own)


def test_a_safety_adapter_that_is_trained_here_equals_one_that_was_trained_before(
    world: Path, models: ModelPair, tmp_path: Path
) -> None:
    own = read_adapter(world / "adapter")
    arguments = {"num_train_epochs": 1, "learning_rate": 0.01, "per_device_train_batch_size": 8, "seed": 3}
    safety = train_adapter(
        world / "aligned", models.chat_template, models.alignment_examples, arguments, like=own, max_length=1024
    )
    assert {key: value.shape for key, value in safety.tensors.items()} == {
        key: value.shape for key, value in own.tensors.items()
    }
    (tmp_path / "safety").mkdir()
    write_adapter(replace(safety, directory=own.directory), tmp_path / "safety")
    spec = {"name": "safe_merge", "all_layers": True, "epochs": 1, "learning_rate": 0.01, "seed": 3}
    inside = patch(world, models, tmp_path / "inside", **spec)
    outside = patch(world, models, tmp_path / "outside", **spec, adapter=str(tmp_path / "safety"))
    assert all(value.equal(outside.tensors[key]) for key, value in inside.tensors.items())


def test_resta_subtracts_the_harmful_update(world: Path, models: ModelPair, tmp_path: Path) -> None:
    own, harmful = updates(read_adapter(world / "adapter")), updates(read_adapter(world / "other"))
    patched = patch(world, models, tmp_path / "out", name="resta", adapter=str(world / "other"), weight=0.5)
    assert_near(updates(patched), {name: own[name] - 0.5 * harmful[name] for name in own})
    itself = patch(world, models, tmp_path / "itself", name="resta", adapter=str(world / "adapter"))
    assert all(value.norm() < 1e-6 for value in updates(itself).values())
    spec = {"name": "resta", "harmful_data": str(world / "harmful.jsonl"), "epochs": 1, "learning_rate": 0.01}
    trained, again = (patch(world, models, tmp_path / place, **spec) for place in ("one", "two"))
    assert all(value.equal(again.tensors[key]) for key, value in trained.tensors.items())
    assert any((updates(trained)[name] - own[name]).norm() > 1e-4 for name in own)


@pytest.mark.parametrize(
    "spec", [{"name": "resta"}, {"name": "safe_merge", "all_layers": True}], ids=lambda s: s["name"]
)
def test_weights_that_a_second_adapter_stores_whole_are_named_in_a_note(
    spec: dict[str, Any], world: Path, models: ModelPair, tmp_path: Path
) -> None:
    other = shutil.copytree(world / "other", tmp_path / "other")
    tensors = load_file(other / "adapter_model.safetensors")
    head = load_file(world / "aligned" / "model.safetensors")["lm_head.weight"] + 1
    save_file({**tensors, "base_model.model.lm_head.weight": head}, other / "adapter_model.safetensors")
    patch(world, models, tmp_path / "out", **spec, adapter=str(other))
    notes = [note for note in read_projection(tmp_path / "out" / "projection.json").notes if "lm_head" in note]
    assert notes == [f"the second adapter {other}: stored whole in the adapter and left out of the sum: lm_head.weight"]


def test_reduced_intruders_are_those_of_peft(world: Path, models: ModelPair, tmp_path: Path) -> None:
    intruders = pytest.importorskip("peft.tuners.lora.intruders", reason="this PEFT does not have the function")
    own = updates(read_adapter(world / "adapter"))
    patched = patch(world, models, tmp_path / "out", name="reduce_intruders")
    model: Any = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(world / "aligned"), world / "adapter", "own"
    )
    intruders.reduce_intruder_dimension(model, "own", "new", logging_sink=None)
    for key, value in patched.tensors.items():
        assert value.equal(model.get_parameter(key.replace(".weight", ".new.weight")).detach()), key
    assert any((updates(patched)[name] - own[name]).norm() > 0.01 * own[name].norm() for name in own)
    assert patched.config == read_adapter(world / "adapter").config
    kept = patch(world, models, tmp_path / "kept", name="reduce_intruders", mitigation=1)  # PEFT keeps λ of the term
    for name, value in updates(kept).items():
        assert (value - own[name]).norm() < 1e-5 * own[name].norm()


def test_a_random_change_is_as_large_as_the_patch_s_in_the_same_layers(
    world: Path, models: ModelPair, tmp_path: Path
) -> None:
    like = {"name": "safe_merge", "adapter": str(world / "other"), "lowest": 2, "weight": 0.3}
    own = updates(read_adapter(world / "adapter"))
    patched = updates(patch(world, models, tmp_path / "like", **like))
    control = patch(world, models, tmp_path / "out", name="random_change", like=like, seed=4)
    record = read_projection(tmp_path / "out" / "projection.json")
    assert {r.module for r in record.layers if r.selected} == {n for n in own if (patched[n] - own[n]).norm() > 1e-6}
    assert record.inputs["second_adapter"]["ref"] == str(world / "other")
    for name, value in updates(control).items():
        change, its = value - own[name], patched[name] - own[name]
        values, theirs = (torch.linalg.svdvals(each) for each in (change, its))
        assert torch.allclose(values, theirs, atol=1e-6)
        if its.norm() > 1e-6:
            assert abs(float((change * its).sum() / change.norm() / its.norm())) < 0.3
    again = patch(world, models, tmp_path / "again", name="random_change", like=like, seed=4)
    assert all(value.equal(again.tensors[key]) for key, value in control.tensors.items())
    for wrong in ("lisa", "safe_delta"):
        with pytest.raises(ValueError, match="does not patch adapters"):
            DEFENSES.parse({"name": "random_change", "like": wrong})


def test_what_does_not_fit_is_one_error_and_nothing_is_written(world: Path, models: ModelPair, tmp_path: Path) -> None:
    few = write_pico_adapter(tmp_path / "few", world / "aligned", r=2, target_modules=["q_proj"])
    more = write_pico_adapter(tmp_path / "more", world / "aligned", r=2, target_modules=["q_proj", "v_proj", "o_proj"])
    wide = write_pico_checkpoint(tmp_path / "wide", hidden_size=64, seed=3)
    foreign = write_pico_adapter(tmp_path / "foreign", wide, **LORA)
    damaged = shutil.copytree(world / "other", tmp_path / "damaged")
    tensors = load_file(damaged / "adapter_model.safetensors")
    save_file({key: value * float("nan") for key, value in tensors.items()}, damaged / "adapter_model.safetensors")
    no_rows = replace(models, alignment_examples=())
    for spec, pair, message in (
        ({"name": "safe_merge", "adapter": str(few)}, models, r"no update of model.layers.0.self_attn.v_proj"),
        ({"name": "resta", "adapter": str(more)}, models, r"changes model.layers.0.self_attn.o_proj"),
        ({"name": "resta", "adapter": str(foreign)}, models, "q_proj.*has the shape"),
        ({"name": "resta", "adapter": str(damaged)}, models, "NaN or infinity"),
        ({"name": "resta", "adapter": str(tmp_path / "nowhere")}, models, "nowhere"),
        ({"name": "safe_merge"}, no_rows, "needs alignment data"),
        ({"name": "one_shot"}, no_rows, "needs alignment data"),
        ({"name": "one_shot", "rows": 99}, models, "there are 12 alignment rows"),
        ({"name": "safe_merge"}, replace(models, base=None), "needs the unaligned base model"),
    ):
        with pytest.raises(StayalignedError, match=message):
            patch(world, pair, tmp_path / "out", **spec)
        assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="exactly one of `adapter` and `harmful_data`"):
        DEFENSES.parse({"name": "resta"})
    with pytest.raises(ValueError, match="set exactly one of"):
        DEFENSES.parse({"name": "safe_merge", "all_layers": True, "lowest": 1})
    assert DEFENSES.parse({"name": "safe_merge"}).needs_alignment_data
    assert not DEFENSES.parse({"name": "safe_merge", "adapter": str(few)}).needs_alignment_data
