"""Safe LoRA in memory has what the command has: subspace files, controls, overrides, notes."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import AutoModelForCausalLM

from stayaligned.core.errors import StayalignedError
from stayaligned.defenses import DEFENSES, ModelPair
from stayaligned.defenses.patching.directories import patch_directory
from stayaligned.defenses.patching.subspace import build_subspace
from stayaligned.defenses.safe_lora import apply_safe_lora
from support.checkpoints import write_family

Log = pytest.LogCaptureFixture


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_family(tmp_path_factory.mktemp("world"))
    build_subspace(root / "chat", root / "base", root / "file", rank=2)
    return root


def load(world: Path, adapter: Path | None = None) -> Any:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(world / "chat"), adapter or world / "adapter")


@pytest.mark.parametrize(
    ("settings", "spec"),
    [
        ({"control": "drop", "lowest": 2}, {"name": "drop", "like": {"name": "safe_lora", "lowest": 2}}),
        (
            {"operator": "complement", "rank": 2, "side": "left"},
            {"name": "complement", "rank": 2, "side": "left", "all_layers": True},
        ),
    ],
)
def test_controls_and_sides_are_those_of_the_command(
    world: Path, tmp_path: Path, settings: dict[str, Any], spec: Any
) -> None:
    reports = apply_safe_lora(load(world), world / "base", world / "chat", **settings)
    pair = ModelPair(world / "chat", world / "base")
    assert reports == patch_directory(world / "adapter", tmp_path / "out", DEFENSES.parse(spec), pair)


def test_a_subspace_file_replaces_the_models(world: Path, tmp_path: Path, caplog: Log) -> None:
    with pytest.raises(StayalignedError, match="holds too little of V"):
        apply_safe_lora(load(world), subspace=world / "file", threshold=0.3)
    reports = apply_safe_lora(load(world), subspace=world / "file", threshold=0.3, allow_undecided=True)
    models = ModelPair(None, None, world / "file", allow_undecided=True)
    spec = DEFENSES.parse({"name": "safe_lora", "threshold": 0.3})
    assert reports == patch_directory(world / "adapter", tmp_path / "out", spec, models)
    assert "leaves open whether" in caplog.text


@pytest.mark.parametrize("given", [{}, {"base": "b"}, {"aligned": "a"}, {"base": "b", "subspace": "f"}])
def test_a_missing_source_of_the_direction_is_an_error(world: Path, given: dict[str, Any]) -> None:
    with pytest.raises(StayalignedError, match="the source of the alignment direction is not specified"):
        apply_safe_lora(load(world), **given)


def test_a_wrong_base_is_refused_or_noted(world: Path, caplog: Log) -> None:
    model = load(world)
    with pytest.raises(StayalignedError, match="have no common ancestor"):
        apply_safe_lora(model, world / "unrelated", world / "chat")
    assert list(model.peft_config) == ["default"]
    apply_safe_lora(model, world / "unrelated", world / "chat", allow_mismatch=True)
    assert "patched all the same, as asked" in caplog.text


def test_whole_modules_are_kept_and_noted(world: Path, caplog: Log) -> None:
    bare = AutoModelForCausalLM.from_pretrained(world / "chat")
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
    model: Any = get_peft_model(bare, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter += 1.0
    caplog.set_level(logging.WARNING)
    apply_safe_lora(model, world / "base", world / "chat", threshold=0.9)
    assert "stored whole in the adapter and copied unchanged: lm_head.weight" in caplog.text
    before, after = (get_peft_model_state_dict(model, adapter_name=name) for name in ("default", "safe_lora"))
    assert before.keys() == after.keys()
    assert {key for key in before if not torch.equal(before[key], after[key])} == {
        k for k in before if "lora_" in k and "B" in k
    }
    tokens = torch.arange(5, 25).unsqueeze(0)
    with torch.no_grad():
        patched = model(tokens).logits
        model.set_adapter("default")
        assert not torch.equal(model(tokens).logits, patched)


def test_a_patch_that_selects_nothing_is_noted(world: Path, caplog: Log) -> None:
    apply_safe_lora(load(world), world / "base", world / "chat", threshold=-2.0)
    assert "no layer was selected, so the output equals the input" in caplog.text
