"""Patching directories: what is written, what is left alone, what the record says."""

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from stayaligned.defenses import DEFENSES, ModelPair
from stayaligned.deltas import BytesDone
from stayaligned.errors import StayalignedError
from stayaligned.files import fingerprint
from stayaligned.patching import PROJECTION_FILE, patch_directory, read_projection
from stayaligned.testing import write_pico_adapter, write_pico_checkpoint


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> ModelPair:
    root = tmp_path_factory.mktemp("models")
    return ModelPair(*(write_pico_checkpoint(root / name, seed=seed) for name, seed in (("aligned", 0), ("base", 1))))


@pytest.fixture
def adapter(models: ModelPair, tmp_path: Path) -> Path:
    return write_pico_adapter(tmp_path / "adapter", Path(models.aligned))


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_the_copy_explains_itself_and_the_input_is_left_alone(tmp_path: Path, adapter: Path, models: ModelPair) -> None:
    before, said = contents(adapter), list[BytesDone]()
    defense = DEFENSES.parse({"name": "safe_lora", "lowest": 2})
    command = ["stayaligned", "project"]
    reports = patch_directory(adapter, tmp_path / "out", defense, models, command=command, progress=said.append)
    assert contents(adapter) == before
    assert sorted(contents(tmp_path / "out")) == ["adapter_config.json", "adapter_model.safetensors", PROJECTION_FILE]
    assert json.loads(contents(tmp_path / "out")["adapter_config.json"]) == json.loads(before["adapter_config.json"])
    assert read_projection(tmp_path / "out" / PROJECTION_FILE) == reports
    assert [report.selected for report in reports].count(True) == 2
    assert said[-1].done == said[-1].total > 0
    record: dict[str, Any] = json.loads((tmp_path / "out" / PROJECTION_FILE).read_text())
    assert record["defense"] == defense.identity()
    assert record["paper"] == "arXiv:2405.16833"
    assert record["command"] == command
    assert record["versions"]["torch"] == importlib.metadata.version("torch")
    for name, path in (("adapter", adapter), ("aligned", models.aligned), ("base", models.base)):
        assert record["inputs"][name] == {"ref": str(path), "sha256": fingerprint(Path(str(path)))}


def test_the_copy_answers_differently_and_with_everything_dropped_as_the_aligned_model(
    tmp_path: Path, adapter: Path, models: ModelPair
) -> None:
    tokens = torch.arange(5, 25).unsqueeze(0)

    def logits(patched: Path | None) -> torch.Tensor:
        model: Any = AutoModelForCausalLM.from_pretrained(models.aligned)
        model = model if patched is None else PeftModel.from_pretrained(model, patched)
        with torch.no_grad():
            return model(tokens).logits

    spec = {"name": "safe_lora", "all_layers": True}
    patch_directory(str(adapter), str(tmp_path / "projected"), DEFENSES.parse(spec), models)
    patch_directory(adapter, tmp_path / "dropped", DEFENSES.parse({"name": "drop", "like": spec}), models)
    assert not torch.allclose(logits(tmp_path / "projected"), logits(adapter), atol=1e-4)
    assert torch.equal(logits(tmp_path / "dropped"), logits(None))


def test_an_existing_output_is_refused_before_any_work(tmp_path: Path, models: ModelPair) -> None:
    with pytest.raises(StayalignedError, match="exists already"):
        patch_directory(tmp_path / "absent", tmp_path, DEFENSES.parse("safe_lora"), models)


def test_a_failed_patch_leaves_no_output(tmp_path: Path, adapter: Path, models: ModelPair) -> None:
    with pytest.raises(StayalignedError):
        patch_directory(adapter, tmp_path / "out", DEFENSES.parse({"name": "safe_lora", "lowest": 99}), models)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_swapped_models_are_refused(tmp_path: Path, adapter: Path, models: ModelPair) -> None:
    swapped = ModelPair(str(models.base), models.aligned)
    with pytest.raises(StayalignedError, match="look swapped"):
        patch_directory(adapter, tmp_path / "out", DEFENSES.parse("safe_lora"), swapped)


@pytest.mark.parametrize("text", [None, "{", "{}", '{"layers": [{"module": "x"}]}', '{"layers": 3}'])
def test_what_is_no_record_is_named(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / PROJECTION_FILE
    if text is not None:
        path.write_text(text)
    with pytest.raises(StayalignedError, match=PROJECTION_FILE):
        read_projection(path)
