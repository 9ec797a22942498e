"""Subspace files: their content compared with the models, and the errors for invalid files and adapters."""

import json
import random
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from stayaligned.algorithms.alignment_delta import FullDelta
from stayaligned.algorithms.safe_lora import ComplementOperator, LoraFactors, Operator, Orthogonal, ScaledGram
from stayaligned.core.errors import StayalignedError
from stayaligned.defenses import DEFENSES, ModelPair
from stayaligned.defenses.patching.directories import patch_directory
from stayaligned.defenses.patching.subspace import build_subspace
from stayaligned.defenses.safe_lora import projection_spec
from stayaligned.hf.placement.layers import linear_weights
from stayaligned.testing import write_pico_adapter, write_pico_checkpoint
from stayaligned.weights.adapters import Adapter, read_adapter
from stayaligned.weights.checkpoints import Checkpoint, open_checkpoint, weights_fingerprint
from stayaligned.weights.deltas import BytesDone
from stayaligned.weights.subspace_file import SubspaceFile
from support.checkpoints import lora_layers
from support.factors import dense

ARCHITECTURES = ("llama", "gpt2", "mixtral", "gpt_oss")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of models, llama's also resharded; `f` is llama's full-rank subspace file."""
    root = tmp_path_factory.mktemp("world")
    for name in ARCHITECTURES:
        write_pico_checkpoint(root / name / "aligned", name, seed=0)
        write_pico_checkpoint(root / name / "base", name, seed=1, ancestor=0)
    write_pico_checkpoint(root / "resharded", seed=0, shard_size="60KB")
    build_subspace(root / "llama/aligned", root / "llama/base", root / "f", rank=64)
    return root


@pytest.fixture
def pair(world: Path) -> tuple[Path, Path]:
    return world / "llama/aligned", world / "llama/base"


def matrices(aligned: Path, base: Path) -> dict[str, torch.Tensor]:
    """{layer name: V (out, in)} from the models that transformers loads."""
    first, second = (
        dict(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).named_parameters())
        for path in (aligned, base)
    )
    found: dict[str, torch.Tensor] = {}
    for weight in linear_weights(Checkpoint(aligned)):
        name, _, expert = weight.name.partition("[")
        parameter = name if name in first else f"{name}.weight"
        v = (first[parameter] - second[parameter]).detach()
        v = v[int(expert.rstrip("]"))] if expert else v
        found[weight.name] = v.T if weight.transposed else v
    return found


def update(v: torch.Tensor, seed: int = 0) -> LoraFactors:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(3, v.shape[1], generator=generator), torch.randn(v.shape[0], 3, generator=generator)
    return LoraFactors(a.to(v.dtype), b.to(v.dtype), 2.0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_operators_from_a_full_rank_file_equal_those_from_the_models(
    architecture: str, world: Path, tmp_path: Path
) -> None:
    models = world / architecture / "aligned", world / architecture / "base"
    build_subspace(*models, tmp_path / "f", energy=1.0)
    file = SubspaceFile(tmp_path / "f")
    expected = matrices(*models)
    assert list(file.header.modules) == list(expected)
    for name, v in expected.items():
        stored, whole = file.delta(name), FullDelta.from_matrix(v.double())
        assert file.header.modules[name].shape == tuple(v.shape)
        assert stored.norm == pytest.approx(whole.norm, rel=1e-9)
        values = torch.linalg.svdvals(v.double())
        operators: list[tuple[Callable[[Any], Operator], int | None]] = [
            (ScaledGram, None),
            (lambda delta: Orthogonal(delta.subspace(rank=3)), 3),
            (lambda delta: ComplementOperator(delta.subspace(energy=0.5), "both"), whole.subspace(energy=0.5).rank),
        ]
        for operator, k in operators:
            # In fp32, the error of the directions grows as the gap to the next singular value shrinks.
            tolerance = 1e-6 * float(values[0] / (values[k - 1] - values[k])) if k else 0.0
            exact = dense(operator(whole)(update(v.double())))
            error = dense(operator(stored)(update(v))) - exact
            assert error.norm() <= max(1e-5, tolerance) * exact.norm(), (name, k)


def test_the_safetensors_library_reads_the_file(world: Path, pair: tuple[Path, Path], tmp_path: Path) -> None:
    build_subspace(*pair, tmp_path / "f", rank=5)
    tensors, modules = load_file(tmp_path / "f"), SubspaceFile(tmp_path / "f").header.modules
    with safe_open(tmp_path / "f", "pt") as opened:
        assert list(opened.metadata()) == ["stayaligned"]
    assert set(tensors) == {f"{name}.{part}" for name in modules for part in ("left", "values", "right")}
    for name, v in matrices(*pair).items():
        left, values, right = (tensors[f"{name}.{part}"] for part in ("left", "values", "right"))
        assert (left.dtype, left.shape, right.shape) == (torch.float32, (v.shape[0], 5), (v.shape[1], 5))
        for side in (left, right):
            torch.testing.assert_close(side.T @ side, torch.eye(5), atol=1e-5, rtol=0)
        torch.testing.assert_close(v @ right, left * values, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(values, torch.linalg.svdvals(v)[:5], atol=1e-5, rtol=1e-5)
        delta = SubspaceFile(tmp_path / "f").delta(name)
        assert all(
            torch.equal(x, y)
            for x, y in zip((left, values, right), (delta.left, delta.values, delta.right), strict=True)
        )


@pytest.mark.parametrize("energy", [0.3, 0.9])
def test_the_file_stores_the_fewest_directions_that_hold_the_energy(
    energy: float, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    header = build_subspace(*pair, tmp_path / "f", energy=energy)
    assert (header.rank, header.energy) == (None, energy)
    for name, v in matrices(*pair).items():
        stored = SubspaceFile(tmp_path / "f").header.modules[name]
        shares = torch.linalg.svdvals(v.double()).square().cumsum(0) / v.double().norm() ** 2
        assert stored.captured_energy == pytest.approx(float(shares[stored.rank - 1]), abs=1e-5)
        assert stored.captured_energy >= energy - 1e-6
        assert float(shares[stored.rank - 2]) < energy + 1e-6


def test_equal_weights_give_equal_bytes_for_every_sharding(
    world: Path, pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The header stores the directories as given, so both builds use relative paths.
    for name, aligned in (("one", pair[0]), ("two", world / "resharded")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "aligned").symlink_to(aligned)
        (tmp_path / name / "base").symlink_to(pair[1])
        monkeypatch.chdir(tmp_path / name)
        build_subspace("aligned", "base", tmp_path / name / "f", rank=3)
    assert (tmp_path / "one/f").read_bytes() == (tmp_path / "two/f").read_bytes()


def test_progress_ends_with_all_bytes_of_the_weights(pair: tuple[Path, Path], tmp_path: Path) -> None:
    seen: list[BytesDone] = []
    build_subspace(*pair, tmp_path / "f", rank=1, progress=seen.append)
    assert [state.done for state in seen] == sorted({state.done for state in seen})
    assert seen[-1].done == seen[-1].total == 2 * sum(4 * v.numel() for v in matrices(*pair).values())


def test_a_module_that_the_alignment_did_not_change_has_no_directions(pair: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(pair[0], tmp_path / "aligned")
    name = "model.layers.1.self_attn.q_proj"
    tensors = load_file(tmp_path / "aligned/model.safetensors")
    tensors[f"{name}.weight"] = load_file(pair[1] / "model.safetensors")[f"{name}.weight"]
    save_file(tensors, tmp_path / "aligned/model.safetensors", metadata={"format": "pt"})
    build_subspace(tmp_path / "aligned", pair[1], tmp_path / "f", rank=4)
    file = SubspaceFile(tmp_path / "f")
    assert (file.header.modules[name].rank, file.header.modules[name].norm) == (0, 0.0)
    assert {module.rank for key, module in file.header.modules.items() if key != name} == {4}
    factors = update(torch.zeros(file.header.modules[name].shape))
    for size in ({"rank": 4}, {"energy": 0.5}):
        after = ComplementOperator(file.delta(name).subspace(**size), "both")(factors)
        assert torch.equal(dense(after), dense(factors))


# ---- the adapter's layers ------------------------------------------------------------------------------------------


def adapter_on(directory: Path, model: Path, **lora: Any) -> Adapter:
    return read_adapter(write_pico_adapter(directory, model, **lora))


@pytest.mark.parametrize(
    ("architecture", "lora"),
    [
        ("llama", {"target_modules": "all-linear"}),
        ("llama", {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]}),
        ("llama", {"target_modules": r".*\.1\..*_proj", "rank_pattern": {"k_proj": 2}, "use_rslora": True}),
        ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
        ("mixtral", {"target_modules": ["k_proj", "o_proj"]}),
    ],
)
def test_the_file_gives_the_same_layers_as_the_model(
    architecture: str, lora: dict[str, Any], world: Path, tmp_path: Path
) -> None:
    models = world / architecture / "aligned", world / architecture / "base"
    build_subspace(*models, tmp_path / "f", rank=1)
    adapter = adapter_on(tmp_path / "adapter", models[0], **lora)
    assert SubspaceFile(tmp_path / "f").layers_of(adapter) == lora_layers(adapter, Checkpoint(models[0]))


def test_modules_that_the_file_lacks_are_refused_with_both_lists(world: Path, tmp_path: Path) -> None:
    adapter = adapter_on(tmp_path / "a", world / "llama/aligned", target_modules=["q_proj", "lm_head"])
    with pytest.raises(StayalignedError, match=r"does not hold: lm_head\. It holds: model\.layers\.0\.mlp") as caught:
        SubspaceFile(world / "f").layers_of(adapter)
    assert "--aligned" in str(caught.value.hint)


def test_adapters_that_a_file_can_not_place_are_refused_with_a_fix(world: Path, tmp_path: Path) -> None:
    file = SubspaceFile(world / "f")
    experts = adapter_on(tmp_path / "experts", world / "mixtral/aligned", target_parameters=["mlp.experts.down_proj"])
    wide = write_pico_checkpoint(tmp_path / "wide", hidden_size=48, num_attention_heads=4)
    dora = adapter_on(tmp_path / "dora", world / "llama/aligned", use_dora=True)
    broken = adapter_on(tmp_path / "broken", world / "llama/aligned")
    next(iter(broken.tensors.values()))[0, 0] = torch.nan
    for adapter, message, hint in (
        (experts, "target_parameters", "--aligned and --base"),
        (adapter_on(tmp_path / "wider", wide), "shapes", "--aligned and --base"),
        (dora, "use_dora", "Merge"),
        (broken, "holds NaN", "diverged"),
    ):
        with pytest.raises(StayalignedError, match=message) as caught:
            file.layers_of(adapter)
        assert hint in str(caught.value.hint)


# ---- the adapter's model -------------------------------------------------------------------------------------------


def naming(adapter: Adapter, model: object) -> Adapter:
    config = {**adapter.config, "base_model_name_or_path": model if model is None else str(model)}
    return Adapter(config, adapter.tensors, adapter.directory)


def test_an_adapter_of_another_model_is_refused_by_its_weights(world: Path, tmp_path: Path) -> None:
    file = SubspaceFile(world / "f")
    adapter = adapter_on(tmp_path / "adapter", world / "llama/aligned")
    assert file.refuse_mismatch(adapter) is None
    assert file.refuse_mismatch(naming(adapter, world / "resharded")) is None
    with pytest.raises(StayalignedError, match="which is the base and not the aligned model"):
        file.refuse_mismatch(naming(adapter, world / "llama/base"))
    other = write_pico_checkpoint(tmp_path / "other", seed=5)
    with pytest.raises(StayalignedError, match=f"trained on {other}, but .* was built from {world / 'llama/aligned'}"):
        file.refuse_mismatch(naming(adapter, other))


def test_a_note_records_that_the_adapters_model_could_not_be_compared(world: Path, tmp_path: Path) -> None:
    file = SubspaceFile(world / "f")
    adapter = adapter_on(tmp_path / "adapter", world / "llama/aligned")
    shutil.copytree(world / "llama/aligned", tmp_path / "quantized")
    config = json.loads((tmp_path / "quantized/config.json").read_text())
    (tmp_path / "quantized/config.json").write_text(json.dumps({**config, "quantization_config": {"bits": 4}}))
    for named in ("/nowhere/model", "org/chat", tmp_path / "quantized", tmp_path):
        note = file.refuse_mismatch(naming(adapter, named))
        assert note is not None
        assert f"names {named}" in note
        assert "not checked" in note
    assert "names no model" in str(file.refuse_mismatch(naming(adapter, None)))


def test_hub_ids_are_compared_by_name(pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, source in (("chat", pair[0]), ("raw", pair[1])):
        cached = tmp_path / "hub" / f"models--org--{name}"
        for revision in ("main", "v2"):
            (cached / "refs").mkdir(parents=True, exist_ok=True)
            (cached / "refs" / revision).write_text("a" * 40)
        shutil.copytree(source, cached / "snapshots" / ("a" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    header = build_subspace("org/chat@v2", "org/raw", tmp_path / "f", rank=1)
    assert (header.aligned.ref, header.aligned.name, header.base.name) == ("org/chat@v2", "org/chat", "org/raw")
    assert header.aligned.sha256 == weights_fingerprint(open_checkpoint(pair[0]))
    file, adapter = SubspaceFile(tmp_path / "f"), adapter_on(tmp_path / "adapter", pair[0])
    assert file.refuse_mismatch(adapter) is None
    assert file.refuse_mismatch(naming(adapter, "org/chat")) is None
    assert "not checked" in str(file.refuse_mismatch(naming(adapter, "/nowhere/model")))
    with pytest.raises(StayalignedError, match="is the base"):
        file.refuse_mismatch(naming(adapter, "org/raw"))
    with pytest.raises(StayalignedError, match=r"built from org/chat@v2"):
        file.refuse_mismatch(naming(adapter, "org/other"))


# ---- projecting from a file ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", ["scaled_gram", "complement"])
def test_a_full_rank_file_projects_like_its_models(
    operator: str, world: Path, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    write_pico_adapter(tmp_path / "adapter", pair[0], target_modules="all-linear")
    patch = DEFENSES.parse(projection_spec(operator, {"rank": 3} if operator == "complement" else {}))
    found = {
        name: patch_directory(tmp_path / "adapter", tmp_path / name, patch, models)
        for name, models in (("models", ModelPair(*pair)), ("file", ModelPair(None, None, world / "f")))
    }
    exact, stored = (load_file(tmp_path / name / "adapter_model.safetensors") for name in found)
    for key, value in exact.items():
        torch.testing.assert_close(stored[key], value, rtol=1e-3, atol=1e-5)
    for one, other in zip(found["models"], found["file"], strict=True):
        assert (one.module, one.selected) == (other.module, other.selected)
        assert one.similarity == pytest.approx(other.similarity, abs=1e-5)
        assert one.truncation_error is None
        assert (other.truncation_error is not None) == (operator == "scaled_gram")
    notes = [json.loads((tmp_path / name / "projection.json").read_text())["notes"] for name in found]
    assert notes[0] == notes[1]


def test_an_unchecked_model_is_noted_and_too_few_stored_directions_are_refused(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    build_subspace(*pair, tmp_path / "f", rank=2)
    adapter = write_pico_adapter(tmp_path / "adapter", pair[0])
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "org/chat"}))
    models = ModelPair(None, None, tmp_path / "f")
    patch_directory(adapter, tmp_path / "out", DEFENSES.parse(projection_spec("scaled_gram", {})), models)
    note, *others = json.loads((tmp_path / "out/projection.json").read_text())["notes"]
    assert "names org/chat, which is not a local directory" in note
    assert any("holds only a part of V: in 4 of 4 changed layers" in other for other in others)
    with pytest.raises(StayalignedError, match="3 directions required, but 2 directions"):
        patch_directory(adapter, tmp_path / "k", DEFENSES.parse(projection_spec("complement", {"rank": 3})), models)
    assert not (tmp_path / "k").exists()


# ---- invalid files -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(world: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("small") / "f"
    build_subspace(world / "llama/aligned", world / "llama/base", path, rank=1)
    return path.read_bytes()


def error_of(content: bytes, path: Path) -> StayalignedError:
    path.write_bytes(content)
    with pytest.raises(StayalignedError) as caught:
        SubspaceFile(path)
    assert str(path) in caught.value.message
    assert "subspace build" in str(caught.value.hint)
    return caught.value


def test_every_flipped_bit_of_the_header_is_detected(small: bytes, tmp_path: Path) -> None:
    end = 8 + int.from_bytes(small[:8], "little")
    bits = range(8 * end)
    for bit in sorted({*bits[:64], *bits[-64:], *random.Random(0).sample(bits, 600)}):
        flipped = bytearray(small)
        flipped[bit // 8] ^= 1 << bit % 8
        error_of(bytes(flipped), tmp_path / "f")


def test_a_file_that_is_too_short_or_too_long_is_refused(small: bytes, tmp_path: Path) -> None:
    for length in (0, 7, 8, 100, *range(200, len(small), 997), len(small) - 1):
        error_of(small[:length], tmp_path / "f")
    error_of(small + b"\0", tmp_path / "f")


def test_other_safetensors_files_and_missing_files_are_refused(small: bytes, world: Path, tmp_path: Path) -> None:
    assert (
        "is not a subspace file"
        in error_of((world / "llama/aligned/model.safetensors").read_bytes(), tmp_path / "f").message
    )
    with pytest.raises(StayalignedError, match="nowhere"):
        SubspaceFile(tmp_path / "nowhere")


def rewritten(content: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    """A file with a changed header and the checksum of the changed header."""
    from stayaligned.weights.subspace_file import _checksum  # pyright: ignore[reportPrivateUsage]

    end = 8 + int.from_bytes(content[:8], "little")
    table = json.loads(content[8:end])
    header = json.loads(table["__metadata__"]["stayaligned"])
    del header["checksum"]
    change(header)
    header["checksum"] = _checksum(header)
    table["__metadata__"]["stayaligned"] = json.dumps(header)
    text = json.dumps(table).encode()
    return len(text).to_bytes(8, "little") + text + content[end:]


def test_invalid_headers_are_refused(small: bytes, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj"
    changes: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
        (lambda header: header.pop("aligned"), "aligned"),
        (lambda header: header.update(note=""), "note"),
        (lambda header: header["modules"][name].update(norm=-1), "norm"),
        (lambda header: header["modules"][name].update(norm=float("nan")), "norm"),
        (lambda header: header["modules"][name].update(captured_energy=1.5), "captured_energy"),
        (lambda header: header["modules"][name].update(rank=2), "does not match the tensors"),
        (lambda header: header["modules"][name].update(shape=[32, 64]), "does not match the tensors"),
        (lambda header: header["modules"].pop(name), "does not match the tensors"),
    ]
    for change, message in changes:
        assert message in error_of(rewritten(small, change), tmp_path / "f").message
    (tmp_path / "f").write_bytes(rewritten(small, lambda header: None))
    assert SubspaceFile(tmp_path / "f").header.rank == 1, "the unchanged header is accepted"


@pytest.mark.parametrize("found", [0, 1, "2", None])
def test_a_file_of_another_format_is_refused_with_both_formats_and_the_command_that_rebuilds_it(
    small: bytes, tmp_path: Path, found: object
) -> None:
    error = error_of(rewritten(small, lambda header: header.update(format=found)), tmp_path / "f")
    assert error.message == f"{tmp_path / 'f'} has format {found!r}, expected format 2"
    assert "Another version of stayaligned wrote it" in str(error.hint)
    assert "stayaligned subspace build" in str(error.hint)


def test_a_file_without_a_format_number_is_refused_with_the_command_that_rebuilds_it(
    small: bytes, tmp_path: Path
) -> None:
    error = error_of(rewritten(small, lambda header: header.pop("format")), tmp_path / "f")
    assert error.message == f"{tmp_path / 'f'} has no format number, expected format 2"


def test_another_format_is_reported_before_a_wrong_checksum(small: bytes, tmp_path: Path) -> None:
    other = small.replace(rb"\"format\": 2", rb"\"format\": 3", 1)
    assert other != small
    assert "has format 3, expected format 2" in error_of(other, tmp_path / "f").message


@pytest.mark.parametrize("part", ["left", "values", "right"])
@pytest.mark.parametrize("number", [float("nan"), float("inf"), 7.0])
def test_damaged_tensors_are_detected(small: bytes, tmp_path: Path, part: str, number: float) -> None:
    (tmp_path / "f").write_bytes(small)
    with safe_open(tmp_path / "f", "pt") as opened:
        metadata = opened.metadata()
    name = "model.layers.1.self_attn.v_proj"
    offset = json.loads(small[8 : 8 + int.from_bytes(small[:8], "little")])[f"{name}.{part}"]["data_offsets"][0]
    offset += 8 + int.from_bytes(small[:8], "little")
    damaged = bytearray(small)
    damaged[offset : offset + 4] = torch.tensor([number]).numpy().tobytes()
    (tmp_path / "f").write_bytes(damaged)
    assert metadata
    file = SubspaceFile(tmp_path / "f")
    assert file.delta("model.layers.0.self_attn.v_proj").norm > 0
    with pytest.raises(StayalignedError, match=f"the tensors of {name} are damaged"):
        file.delta(name)


def test_invalid_input_is_refused_before_any_work_and_writes_nothing(
    world: Path, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "there").write_text("other")
    out = tmp_path / "f"
    seen: list[BytesDone] = []
    for models, where, size, message in (
        (pair, tmp_path / "there", {"rank": 1}, "exists already"),
        (pair, out, {}, "exactly one"),
        (pair, out, {"rank": 1, "energy": 0.5}, "exactly one"),
        (pair, out, {"rank": 0}, "at least 1"),
        (pair, out, {"energy": 1.5}, "energy in"),
        ((pair[0], pair[0]), out, {"rank": 1}, "same directory"),
        ((pair[0], world / "resharded"), out, {"rank": 1}, "same weights"),
        ((pair[0], world / "gpt2/base"), out, {"rank": 1}, "is a LlamaForCausalLM, but .* a GPT2LMHeadModel"),
        ((pair[0], tmp_path), out, {"rank": 1}, "holds neither"),
    ):
        with pytest.raises(StayalignedError, match=message):
            build_subspace(*models, where, **size, progress=seen.append)
    assert not seen, "refused before any work"
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert (tmp_path / "there").read_text() == "other"


def test_a_file_that_appears_during_the_build_is_not_overwritten(pair: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(StayalignedError, match="exists already"):
        build_subspace(*pair, tmp_path / "f", rank=1, progress=lambda _: (tmp_path / "f").write_text("other"))
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("f", "other")]


def test_a_full_disk_leaves_no_file(pair: tuple[Path, Path], tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # writing more fails
    try:
        with pytest.raises(StayalignedError, match="can't be written: File too large") as caught:
            build_subspace(*pair, tmp_path / "f", rank=16)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "space" in str(caught.value.hint)
    assert not list(tmp_path.iterdir())


def test_damaged_weights_leave_no_file(pair: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(pair[0], tmp_path / "aligned")
    tensors = load_file(tmp_path / "aligned/model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = torch.inf
    save_file(tensors, tmp_path / "aligned/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StayalignedError, match=r"model\.layers\.1\.mlp\.up_proj holds NaN or infinity"):
        build_subspace(tmp_path / "aligned", pair[1], tmp_path / "f", rank=2)
    assert [path.name for path in tmp_path.iterdir()] == ["aligned"]


# ---- the command ---------------------------------------------------------------------------------------------------


def stayaligned(*arguments: object) -> subprocess.CompletedProcess[str]:
    program = "import sys; from stayaligned.cli import main; sys.argv[0] = 'stayaligned'; main()"
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_command_builds_and_shows_a_file(pair: tuple[Path, Path], tmp_path: Path) -> None:
    models = ["--aligned", pair[0], "--base", pair[1]]
    ended = stayaligned("subspace", "build", *models, "--rank", 4, "--out", tmp_path / "f.safetensors")
    assert ended.returncode == 0, ended.stderr
    header = SubspaceFile(tmp_path / "f.safetensors").header
    assert "14 modules, 4 to 4 directions each" in ended.stdout
    shown = stayaligned("subspace", "show", tmp_path / "f.safetensors").stdout
    for model in (header.aligned, header.base):
        assert f"{model.ref}  sha256 {model.sha256}" in shown
    assert "built with rank 4" in shown
    for name, module in header.modules.items():
        (row,) = (line.split() for line in shown.splitlines() if line.startswith(name))
        shape = "×".join(map(str, module.shape))
        assert row == [name, shape, "4", f"{module.captured_energy:.4f}", f"{module.norm:.4g}"]
    ended = stayaligned("subspace", "build", *models, "--rank", 1, "--energy", 0.5, "--out", tmp_path / "g")
    assert ended.returncode == 2
    assert "Give one of --rank K and --energy E" in ended.stderr


def test_showing_a_file_imports_no_torch_and_no_host_library(world: Path) -> None:
    program = (
        "import sys; from stayaligned.cli import main\n"
        f"sys.argv = ['stayaligned', 'subspace', 'show', {str(world / 'f')!r}]\n"
        "try: main()\nexcept SystemExit as ended: assert not ended.code, ended.code\n"
        "found = {'torch', 'transformers', 'peft', 'huggingface_hub'} & set(sys.modules); assert not found, found"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
