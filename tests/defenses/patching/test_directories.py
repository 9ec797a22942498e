"""Patching directories: what is written, what does not change, and what the record contains."""

import importlib.metadata
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from stayaligned.core.errors import StayalignedError
from stayaligned.core.files import fingerprint
from stayaligned.defenses import DEFENSES, Execution, ModelPair
from stayaligned.defenses.patching.directories import (
    PROJECTION_FILE,
    patch_directories,
    patch_directory,
    read_projection,
)
from stayaligned.defenses.patching.scan import scan_adapters
from stayaligned.defenses.safe_lora import apply_safe_lora
from stayaligned.report.scan import threshold_outcomes, write_scan
from stayaligned.testing import write_pico_adapter, write_pico_checkpoint
from stayaligned.weights.checkpoints import open_checkpoint, weights_fingerprint
from stayaligned.weights.deltas import BytesDone


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> ModelPair:
    root = tmp_path_factory.mktemp("models")
    return ModelPair(
        write_pico_checkpoint(root / "aligned", seed=0), write_pico_checkpoint(root / "base", seed=1, ancestor=0)
    )


@pytest.fixture
def adapter(models: ModelPair, tmp_path: Path) -> Path:
    return write_pico_adapter(tmp_path / "adapter", Path(models.aligned))


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_the_record_describes_the_copy_and_the_input_is_not_changed(
    tmp_path: Path, adapter: Path, models: ModelPair
) -> None:
    before, progress = contents(adapter), list[BytesDone]()
    defense = DEFENSES.parse({"name": "safe_lora", "lowest": 2})
    command = ["stayaligned", "project"]
    reports = patch_directory(adapter, tmp_path / "out", defense, models, command=command, progress=progress.append)
    assert contents(adapter) == before
    assert sorted(contents(tmp_path / "out")) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        PROJECTION_FILE,
    ]
    assert json.loads(contents(tmp_path / "out")["adapter_config.json"]) == json.loads(before["adapter_config.json"])
    assert list(read_projection(tmp_path / "out" / PROJECTION_FILE).layers) == reports
    assert [report.selected for report in reports].count(True) == 2
    assert progress[-1].done == progress[-1].total > 0
    record: dict[str, Any] = json.loads((tmp_path / "out" / PROJECTION_FILE).read_text())
    assert record["defense"] == defense.identity()
    assert record["paper"] == "https://arxiv.org/abs/2405.16833"
    assert record["command"] == command
    assert record["versions"]["torch"] == importlib.metadata.version("torch")
    assert record["inputs"]["adapter"] == {"ref": str(adapter), "sha256": fingerprint(adapter)}
    for name, path in (("aligned", models.aligned), ("base", models.base)):
        digest = weights_fingerprint(open_checkpoint(str(path)))
        assert record["inputs"][name] == {"ref": str(path), "weights_sha256": digest}


def test_a_projected_adapter_changes_the_logits_and_a_dropped_one_gives_those_of_the_aligned_model(
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


@pytest.mark.parametrize(
    "text",
    [None, "{", "{}", '{"layers": 3}', '{"format": 2, "layers": [{"module": "x"}]}', '{"format": 2, "layers": 3}'],
)
def test_the_error_names_a_file_that_is_not_a_record(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / PROJECTION_FILE
    if text is not None:
        path.write_text(text)
    with pytest.raises(StayalignedError, match=PROJECTION_FILE):
        read_projection(path)


@pytest.mark.parametrize("found", [1, 3, None])
def test_a_record_of_another_format_is_refused_with_both_formats(
    tmp_path: Path, adapter: Path, models: ModelPair, found: int | None
) -> None:
    patch_directory(adapter, tmp_path / "out", DEFENSES.parse({"name": "safe_lora", "lowest": 2}), models)
    path = tmp_path / "out" / PROJECTION_FILE
    record = {**json.loads(path.read_text()), "format": found}
    path.write_text(json.dumps({key: value for key, value in record.items() if value is not None}))
    with pytest.raises(StayalignedError) as caught:
        read_projection(path)
    number = "no format number" if found is None else f"format {found}"
    assert caught.value.message == f"{path} has {number}, expected format 2"
    assert "Another version of stayaligned wrote it. Patch again" in str(caught.value.hint)


def test_patching_several_adapters_in_one_pass_equals_patching_each_alone(tmp_path: Path, models: ModelPair) -> None:
    settings: list[dict[str, Any]] = [
        {"r": 4},
        {"r": 2, "target_modules": "all-linear"},
        {"r": 8, "target_modules": ["down_proj", "v_proj"], "layers_to_transform": [1]},
        {"r": 4, "dtype": "bfloat16"},
    ]
    sources = [
        write_pico_adapter(tmp_path / f"in{i}", Path(str(models.aligned)), seed=i, **each)
        for i, each in enumerate(settings)
    ]
    for spec in (
        {"name": "safe_lora", "lowest": 2},
        {"name": "complement", "rank": 3, "threshold": 0.99},
        {"name": "random_subspace", "like": {"name": "safe_lora", "all_layers": True}},
    ):
        defense, root = DEFENSES.parse(spec), tmp_path / str(spec["name"])
        outs = [root / f"together{i}" for i in range(4)]
        together = patch_directories(sources, outs, defense, models)
        for i, (source, out) in enumerate(zip(sources, outs, strict=True)):
            alone = patch_directory(source, root / f"alone{i}", defense, models)
            assert [r.module for r in together[i]] == [r.module for r in alone]
            assert [r.selected for r in together[i]] == [r.selected for r in alone]
            one, other = (
                load_file(out / "adapter_model.safetensors"),
                load_file(root / f"alone{i}" / "adapter_model.safetensors"),
            )
            for key, value in one.items():  # a larger product sums in another order
                torch.testing.assert_close(value, other[key], rtol=2e-2 if i == 3 else 1e-4, atol=1e-5)
            record = json.loads((out / PROJECTION_FILE).read_text())
            assert record["inputs"]["adapter"] == {"ref": str(source), "sha256": fingerprint(source)}


def test_nothing_is_written_if_one_of_several_adapters_is_invalid(
    tmp_path: Path, models: ModelPair, adapter: Path
) -> None:
    bad = write_pico_adapter(tmp_path / "bad", Path(str(models.aligned)))
    (bad / "adapter_model.safetensors").write_bytes(b"cut")
    with pytest.raises(StayalignedError, match="bad"):
        patch_directories([adapter, bad], [tmp_path / "o1", tmp_path / "o2"], DEFENSES.parse("complement"), models)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "bad"]


def peft_model(models: ModelPair, adapter: Path) -> Any:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(models.aligned), adapter)


def test_safe_lora_in_memory_equals_safe_lora_on_files(tmp_path: Path, adapter: Path, models: ModelPair) -> None:
    assert models.base is not None
    assert models.aligned is not None
    for settings, spec in (
        ({"threshold": 0.6}, {"name": "safe_lora", "threshold": 0.6}),
        ({}, {"name": "safe_lora", "all_layers": True}),
        ({"operator": "complement", "rank": 2}, {"name": "complement", "rank": 2, "all_layers": True}),
    ):
        model = peft_model(models, adapter)
        trained = {k: v.clone() for k, v in get_peft_model_state_dict(model, adapter_name="default").items()}
        out = tmp_path / f"on-disk-{len(settings)}"
        reports = apply_safe_lora(model, models.base, models.aligned, **settings)
        assert reports == patch_directory(adapter, out, DEFENSES.parse(spec), models)
        assert model.active_adapter == "safe_lora"
        model.save_pretrained(str(tmp_path / f"saved-{len(settings)}"), selected_adapters=["safe_lora"])
        saved = load_file(tmp_path / f"saved-{len(settings)}" / "safe_lora" / "adapter_model.safetensors")
        written = load_file(out / "adapter_model.safetensors")
        assert saved.keys() == written.keys()
        assert all(torch.equal(saved[key], written[key]) for key in saved)
        now = get_peft_model_state_dict(model, adapter_name="default")
        assert all(torch.equal(trained[key], now[key]) for key in trained)


def test_safe_lora_in_memory_gives_the_logits_of_the_patched_adapter(
    tmp_path: Path, adapter: Path, models: ModelPair
) -> None:
    tokens = torch.arange(5, 25).unsqueeze(0)
    model = peft_model(models, adapter)
    apply_safe_lora(model, str(models.base), str(models.aligned), lowest=2)
    patch_directory(adapter, tmp_path / "out", DEFENSES.parse({"name": "safe_lora", "lowest": 2}), models)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, peft_model(models, tmp_path / "out")(tokens).logits)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"threshold": 0.3, "lowest": 2}, "exactly one of"),
        ({"operator": "orthogonal"}, "exactly one of `rank` and `energy`"),
        ({"lowest": 99}, "lowest is 99"),
        ({"adapter_name": "frensh"}, "no adapter 'frensh'"),
        ({"new_name": "default"}, "already has an adapter 'default'"),
    ],
)
def test_safe_lora_in_memory_refuses_invalid_settings_and_does_not_change_the_model(
    adapter: Path, models: ModelPair, settings: dict[str, Any], expected: str
) -> None:
    model = peft_model(models, adapter)
    with pytest.raises(StayalignedError, match=expected):
        apply_safe_lora(model, str(models.base), str(models.aligned), **settings)
    assert list(model.peft_config) == ["default"]
    assert model.active_adapter == "default"


def test_scanning_reports_every_layer_and_changes_nothing(tmp_path: Path, adapter: Path, models: ModelPair) -> None:
    everything = DEFENSES.parse({"name": "safe_lora", "all_layers": True})
    before = contents(adapter)
    (scanned,) = scan_adapters([adapter], everything, models, Execution())
    layers = list(scanned.layers)
    assert layers == patch_directory(adapter, tmp_path / "out", everything, models)
    assert contents(adapter) == before
    rows = threshold_outcomes(layers)
    assert (rows[0].changed, rows[0].kept_norm, rows[-1].changed) == (0, 1.0, len(layers))
    for row in rows:
        defense = DEFENSES.parse({"name": "safe_lora", "threshold": row.threshold})
        found = patch_directory(adapter, tmp_path / f"at-{row.threshold}", defense, models)
        assert row.changed == sum(r.selected for r in found)
        after = sum((r.update_norm * r.shrinkage) ** 2 for r in found)
        assert row.kept_norm == pytest.approx((after / sum(r.update_norm**2 for r in found)) ** 0.5)
    paths = write_scan(layers, tmp_path / "scan", everything.identity())
    record = json.loads(paths[0].read_text())
    assert [each["similarity"] for each in record["layers"]] == [layer.similarity for layer in layers]
    ElementTree.fromstring(paths[1].read_text())  # noqa: S314 - our own
    with pytest.raises(StayalignedError, match="leaves layers out"):
        scan_adapters([adapter], DEFENSES.parse({"name": "safe_lora", "lowest": 1}), models, Execution())


def test_a_patch_of_what_was_patched_before_says_so(tmp_path: Path, adapter: Path, models: ModelPair) -> None:
    patch = DEFENSES.parse({"name": "safe_lora", "all_layers": True})
    patch_directory(adapter, tmp_path / "once", patch, models)
    patch_directory(tmp_path / "once", tmp_path / "twice", patch, models)
    words = f"{tmp_path / 'once'} was patched before, by safe_lora"
    found = [
        any(note.startswith(words) for note in read_projection(tmp_path / name / PROJECTION_FILE).notes)
        for name in ("once", "twice")
    ]
    assert found == [False, True]
    (scanned,) = scan_adapters([tmp_path / "once"], patch, models, Execution())
    assert any(note.startswith(words) for note in scanned.notes)
