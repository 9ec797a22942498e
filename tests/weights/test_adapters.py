"""Reading and writing adapters: bytes are preserved, damage is named, and nothing is overwritten."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from stayaligned.algorithms.safe_lora import LoraFactors
from stayaligned.core.errors import StayalignedError
from stayaligned.core.files import new_directory
from stayaligned.weights.adapters import Adapter, LoraLayer, notes_on_copies, read_adapter, write_adapter

CONFIG = {"peft_type": "LORA", "r": 2, "zeta": None, "alpha_pattern": {"ü": 1.5}, "target_modules": ["q"]}
LAYER = LoraLayer(
    "q",
    "q.weight",
    "base_model.model.q.lora_A.weight",
    "base_model.model.q.lora_B.weight",
    rank=2,
    scaling=0.5,
    in_features=4,
    out_features=3,
)


def save(directory: Path, dtype: torch.dtype = torch.float32, **config: Any) -> Path:
    directory.mkdir(parents=True)
    (directory / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}), encoding="utf-8")
    generator = torch.Generator().manual_seed(0)
    factors = {
        "base_model.model.q.lora_A.weight": (2, 4),
        "base_model.model.q.lora_B.weight": (3, 2),
        "base_model.model.p.lora_A.weight": (2, 4),
    }
    tensors = {key: torch.randn(*shape, generator=generator).to(dtype) for key, shape in factors.items()}
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_reading_and_writing_preserves_configuration_names_and_bytes(tmp_path: Path, dtype: torch.dtype) -> None:
    source = save(tmp_path / "a", dtype)
    write(read_adapter(source), tmp_path / "b" / "c")
    copy = tmp_path / "b" / "c"
    assert sorted(path.name for path in copy.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert (copy / "adapter_model.safetensors").read_bytes() == (source / "adapter_model.safetensors").read_bytes()
    assert list(json.loads((copy / "adapter_config.json").read_text(encoding="utf-8")).items()) == list(CONFIG.items())
    with safe_open(copy / "adapter_model.safetensors", framework="pt") as stream:
        assert stream.metadata() == {"format": "pt"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_factors_are_unchanged_by_a_conversion_to_fp32_and_back(tmp_path: Path, dtype: torch.dtype) -> None:
    adapter = read_adapter(save(tmp_path / "a", dtype))
    factors = adapter.factors(LAYER)
    assert (factors.a.dtype, factors.b.dtype, factors.scaling) == (torch.float32, torch.float32, 0.5)
    again = adapter.with_factors({LAYER: factors})
    assert all(torch.equal(again.tensors[key], adapter.tensors[key]) for key in adapter.tensors)
    assert {tensor.dtype for tensor in again.tensors.values()} == {dtype}


def test_changing_factors_returns_a_new_adapter(tmp_path: Path) -> None:
    adapter = read_adapter(save(tmp_path / "a"))
    before = {key: tensor.clone() for key, tensor in adapter.tensors.items()}
    factors = adapter.factors(LAYER)
    changed = adapter.with_factors({LAYER: factors._replace(b=factors.b * 2)})
    assert torch.equal(
        changed.tensors["base_model.model.q.lora_B.weight"], before["base_model.model.q.lora_B.weight"] * 2
    )
    assert all(torch.equal(adapter.tensors[key], before[key]) for key in before)


def test_overflow_in_the_stored_dtype_is_refused(tmp_path: Path) -> None:
    adapter = read_adapter(save(tmp_path / "a", torch.float16))
    factors = adapter.factors(LAYER)
    with pytest.raises(StayalignedError, match=r"q: the changed factors overflow torch\.float16"):
        adapter.with_factors({LAYER: factors._replace(b=factors.b * 1e6)})


def write(adapter: Adapter, path: Path, **notes: str) -> None:
    with new_directory(path) as directory:
        write_adapter(adapter, directory, notes=notes)


def test_notes_are_written_beside_the_adapter(tmp_path: Path) -> None:
    write(read_adapter(save(tmp_path / "a")), tmp_path / "b", note="é")
    assert (tmp_path / "b" / "note").read_text(encoding="utf-8") == "é"


def test_tokenizer_and_model_card_are_copied_but_not_the_training_state(tmp_path: Path) -> None:
    source = save(tmp_path / "a")
    for name in ("tokenizer.json", "chat_template.jinja", "README.md", "trainer_state.json", "optimizer.pt", "x.bin"):
        (source / name).write_text(name)
    (source / "projection.json").write_text("of an earlier patch")
    write(read_adapter(source), tmp_path / "b")
    beside = {path.name for path in (tmp_path / "b").iterdir()} - {"adapter_config.json", "adapter_model.safetensors"}
    assert beside == {"tokenizer.json", "chat_template.jinja", "README.md"}
    assert (tmp_path / "b" / "README.md").read_text() == "README.md"


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    adapter = read_adapter(save(tmp_path / "a"))
    unwritable = Adapter({**adapter.config, "x": object()}, adapter.tensors, adapter.directory)
    with pytest.raises(TypeError):
        write(unwritable, tmp_path / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@given(st.floats(-7, -2), st.floats(-1, 1), st.integers(0, 99))
def test_a_small_b_keeps_its_precision_in_fp16(exponent_b: float, exponent_a: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(*shape, generator=generator) for shape in ((2, 4), (3, 2)))
    tensors = {"base_model.model.q.lora_A.weight": a.half(), "base_model.model.q.lora_B.weight": b.half()}
    adapter = Adapter(CONFIG, tensors, Path("x"))
    exact = LoraFactors(a * 10**exponent_a, b * 10**exponent_b, 0.5)
    update = exact.b.double() @ exact.a.double()
    kept = adapter.to_stored_dtype(LAYER, exact)
    assert {kept.a.dtype, kept.b.dtype} == {torch.float16}
    error = (kept.b.double() @ kept.a.double() - update).norm() / update.norm()
    assert float(error) <= 2e-3


def test_the_error_for_a_directory_without_an_adapter_names_the_subdirectory_that_has_one(tmp_path: Path) -> None:
    with pytest.raises(StayalignedError, match="no such directory"):
        read_adapter(tmp_path / "absent")
    save(tmp_path / "root" / "french")
    with pytest.raises(StayalignedError) as caught:
        read_adapter(tmp_path / "root")
    assert str(tmp_path / "root" / "french") in str(caught.value.hint)


def test_other_adapter_kinds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StayalignedError, match="'LOHA', expected 'LORA'"):
        read_adapter(save(tmp_path / "a", peft_type="LOHA"))


def test_pickled_adapters_are_refused_with_a_fix(tmp_path: Path) -> None:
    (save(tmp_path / "a") / "adapter_model.safetensors").rename(tmp_path / "a" / "adapter_model.bin")
    with pytest.raises(StayalignedError) as caught:
        read_adapter(tmp_path / "a")
    assert "safetensors" in str(caught.value.hint)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.95])
def test_truncated_weights_are_named(tmp_path: Path, share: float) -> None:
    weights = save(tmp_path / "a") / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: int(share * len(content))])
    with pytest.raises(StayalignedError, match=r"adapter_model\.safetensors can't be read"):
        read_adapter(tmp_path / "a")


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_a_damaged_configuration_is_named(tmp_path: Path, text: str) -> None:
    (save(tmp_path / "a") / "adapter_config.json").write_text(text)
    with pytest.raises(StayalignedError, match=r"adapter_config\.json"):
        read_adapter(tmp_path / "a")


def test_links_out_of_a_foreign_adapter_are_not_copied_but_named(tmp_path: Path) -> None:
    source = save(tmp_path / "a")
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "private.txt").write_text("private")
    (source / "inner.md").write_text("inner")
    links = {
        "README.md": tmp_path / "secret" / "private.txt",
        "relative.txt": Path("../secret/private.txt"),
        "directory.json": tmp_path / "secret",
        "dangling.json": tmp_path / "nothing",
        "loop.json": source / "loop.json",
        "indirect.md": source / "README.md",
        "na\nme\x1b[31m.txt": tmp_path / "secret" / "private.txt",
        "device.txt": Path("/dev/zero"),
    }
    for name, target in links.items():
        (source / name).symlink_to(target)
    (source / "own.md").symlink_to("inner.md")
    os.mkfifo(source / "pipe.txt")
    write(read_adapter(source), tmp_path / "b")
    copied = {path.name for path in (tmp_path / "b").iterdir()} - {"adapter_config.json", "adapter_model.safetensors"}
    assert copied == {"inner.md", "own.md"}
    assert not any("private" in (tmp_path / "b" / name).read_text() for name in copied)
    notes = notes_on_copies(source)
    assert len(notes) == len(links) + 1
    assert all(character not in note for note in notes for character in "\n\x1b")


def test_an_adapter_in_the_hubs_cache_is_copied_through_its_links(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--x--y" / "blobs", tmp_path / "models--x--y" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    for index, file in enumerate(sorted(save(tmp_path / "a").iterdir())):
        file.rename(blobs / str(index))
        snapshot.mkdir(parents=True, exist_ok=True)
        (snapshot / file.name).symlink_to(f"../../blobs/{index}")
    (blobs / "card").write_text("card")
    (snapshot / "README.md").symlink_to("../../blobs/card")
    (snapshot / "private.txt").symlink_to("../../../other")
    (tmp_path / "other").write_text("private")
    write(read_adapter(snapshot), tmp_path / "b")
    assert (tmp_path / "b" / "README.md").read_text() == "card"
    assert not (tmp_path / "b" / "private.txt").exists()
    assert notes_on_copies(snapshot) == [f"not copied: private.txt (a link out of {snapshot})"]


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_every_output_has_the_rights_of_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        source = save(tmp_path / "a")
        (source / "README.md").write_text("card")
        write(read_adapter(source), tmp_path / "b", note="x")
    finally:
        os.umask(before)
    assert (tmp_path / "b").stat().st_mode & 0o777 == 0o777 & ~umask
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "b").iterdir()} == {0o666 & ~umask}


@pytest.mark.parametrize(
    ("written", "found"),
    [
        ("model.q.lora_A.weight", "model.q.lora_A.weight"),
        ("module.base_model.model.model.q.lora_A.weight", "model.q.lora_A.weight"),
        ("base_model.model._orig_mod.model.q.lora_A.weight", "model.q.lora_A.weight"),
        (
            "base_model.model.model.layers.0._checkpoint_wrapped_module.q.lora_A.weight",
            "model.layers.0.q.lora_A.weight",
        ),
        ("base_model.model.base_model.model.model.q.lora_B.weight", "model.q.lora_B.weight"),
    ],
)
def test_names_of_wrapped_models_that_peft_would_ignore_are_an_error(tmp_path: Path, written: str, found: str) -> None:
    source = save(tmp_path / "a")
    save_file({written: torch.ones(2, 4)}, source / "adapter_model.safetensors")
    with pytest.raises(StayalignedError, match=f"would ignore {written}.* the name base_model.model.{found}"):
        read_adapter(source)


def test_names_with_pefts_default_adapter_name_are_read_as_peft_reads_them(tmp_path: Path) -> None:
    source = save(tmp_path / "a")
    tensors = read_adapter(source).tensors
    named = {key.replace(".weight", ".default.weight"): tensor for key, tensor in tensors.items()}
    save_file(named, source / "adapter_model.safetensors")
    again = read_adapter(source).tensors
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[key], tensors[key]) for key in tensors)
