"""Layers that one model only stores in another type are not an alignment direction, and not an update."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stayaligned.core.errors import StayalignedError
from stayaligned.defenses import DEFENSES, ModelPair
from stayaligned.defenses.patching.directories import patch_directory, read_projection
from stayaligned.defenses.patching.subspace import build_subspace
from stayaligned.testing import write_pico_checkpoint
from stayaligned.weights.subspace_file import SubspaceFile
from support.checkpoints import write_family

Change = Callable[[torch.Tensor], torch.Tensor]
EVERY = DEFENSES.parse({"name": "safe_lora", "all_layers": True})
LAYER = "model.layers.1."


def same(weight: torch.Tensor) -> torch.Tensor:
    return weight


def noise(weight: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(weight.shape, generator=generator)


def merged_and_unmerged(weight: torch.Tensor) -> torch.Tensor:
    update = 0.01 * noise(weight)
    return (weight + update) - update


ROUNDINGS: dict[str, tuple[Change, Change]] = {
    "aligned in bf16": (torch.Tensor.bfloat16, same),
    "aligned in fp16": (torch.Tensor.half, same),
    "base in bf16": (same, torch.Tensor.bfloat16),
    "base in fp16": (same, torch.Tensor.half),
    "aligned in bf16, then in fp32": (lambda w: w.bfloat16().float(), same),
    "base in fp16, then in fp32": (same, lambda w: w.half().float()),
    "aligned in bf16, base in fp16": (torch.Tensor.bfloat16, torch.Tensor.half),
    "aligned in fp16, base in bf16": (torch.Tensor.half, torch.Tensor.bfloat16),
    "merged and unmerged in fp32": (merged_and_unmerged, same),
}
FINE_TUNES: dict[str, tuple[Change, Change]] = {
    "both in fp32": (lambda w: w + 1e-5 * w.std() * noise(w), same),
    "both in bf16": (lambda w: (w + 1e-3 * w.std() * noise(w)).bfloat16(), torch.Tensor.bfloat16),
    "base in bf16": (lambda w: w + 1e-3 * w.std() * noise(w), torch.Tensor.bfloat16),
    "aligned in bf16": (lambda w: (w + 1e-3 * w.std() * noise(w)).bfloat16(), same),
    "base in fp16": (lambda w: w + 1e-4 * w.std() * noise(w), torch.Tensor.half),
    "one row": (lambda w: torch.cat([w[:1] + 1e-3 * w.std(), w[1:]]), same),
}


def edit(directory: Path, change: Change, where: str = LAYER) -> None:
    file = directory / "model.safetensors"
    weights = {name: change(w) if where in name and w.ndim == 2 else w for name, w in load_file(file).items()}
    save_file({name: weight.contiguous() for name, weight in weights.items()}, file, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`chat`; `base`, whose second layer is that of chat; an `adapter` on all linears; and the fine-tune `tuned`."""
    root = write_family(tmp_path_factory.mktemp("world"), target_modules="all-linear")
    chat, base = (load_file(root / name / "model.safetensors") for name in ("chat", "base"))
    kept = {name: chat[name] if LAYER in name else weight for name, weight in base.items()}
    save_file(kept, root / "base" / "model.safetensors", metadata={"format": "pt"})
    return root


def pair(world: Path, root: Path, changes: tuple[Change, Change]) -> ModelPair:
    for name, change in zip(("chat", "base"), changes, strict=True):
        shutil.copytree(world / name, root / name)
        edit(root / name, change)
    return ModelPair(root / "chat", root / "base", allow_mismatch=True)


@pytest.mark.parametrize("kind", ROUNDINGS)
def test_layers_that_are_only_rounded_are_no_direction(world: Path, tmp_path: Path, kind: str) -> None:
    models = pair(world, tmp_path, ROUNDINGS[kind])
    build_subspace(tmp_path / "chat", tmp_path / "base", tmp_path / "file", rank=32)
    by_file = ModelPair(tmp_path / "chat", None, tmp_path / "file", allow_undecided=True)
    rounded = {n for n, m in SubspaceFile(tmp_path / "file").header.modules.items() if m.rounding and not m.rank}
    assert rounded == {name for name in rounded if LAYER in name}
    assert len(rounded) == 7
    for number, (source, given) in enumerate(
        (source, given) for source in ("adapter", "tuned") for given in (models, by_file)
    ):
        out = tmp_path / f"out{number}"
        if source == "adapter" and given is by_file:
            given = ModelPair(None, None, tmp_path / "file", allow_undecided=True)
        shutil.copytree(world / source, tmp_path / f"in{number}")
        config = tmp_path / f"in{number}" / "adapter_config.json"
        if config.exists():
            config.write_text(config.read_text().replace(str(world / "chat"), "org/chat"))
        reports = patch_directory(tmp_path / f"in{number}", out, EVERY, given)
        assert {report.module for report in reports if report.skipped == "rounded_direction"} == rounded
        assert all(report.selected == (report.module not in rounded) for report in reports)
        notes = read_projection(out / "projection.json").notes
        assert any("in 7 of 14 layers aligned and base differ only by rounding to another type" in n for n in notes)


@pytest.mark.parametrize("kind", FINE_TUNES)
def test_a_slight_fine_tune_is_a_direction(world: Path, tmp_path: Path, kind: str) -> None:
    pair(world, tmp_path, FINE_TUNES[kind])
    build_subspace(tmp_path / "chat", tmp_path / "base", tmp_path / "file", rank=32)
    header = SubspaceFile(tmp_path / "file").header
    assert not any(module.rounding for module in header.modules.values())
    assert all(module.rank for module in header.modules.values())


def test_models_that_differ_only_by_rounding_are_an_error(world: Path, tmp_path: Path) -> None:
    for name in ("half", "adapter"):
        shutil.copytree(world / ("chat" if name == "half" else name), tmp_path / name)
    edit(tmp_path / "half", torch.Tensor.bfloat16, "model.")
    for source in (world / "adapter", world / "tuned"):
        with pytest.raises(
            StayalignedError, match=r"the same weights in all 14 layers to patch \(at most rounded to another type\)"
        ):
            patch_directory(source, tmp_path / "out", EVERY, ModelPair(world / "chat", tmp_path / "half"))
    with pytest.raises(StayalignedError, match=r"the same weights \(at most rounded"):
        build_subspace(world / "chat", tmp_path / "half", tmp_path / "out", rank=4)
    with pytest.raises(StayalignedError, match="the update is zero, but for rounding, in all 14 layers"):
        patch_directory(tmp_path / "half", tmp_path / "out", EVERY, ModelPair(world / "chat", world / "base"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "half"]


def test_an_update_that_is_only_rounding_is_none(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "tuned", tmp_path / "tuned")
    chat, tuned = (load_file(world / name / "model.safetensors") for name in ("chat", "tuned"))
    kept = {name: chat[name].bfloat16() if LAYER in name else weight for name, weight in tuned.items()}
    save_file(kept, tmp_path / "tuned" / "model.safetensors", metadata={"format": "pt"})
    write_pico_checkpoint(tmp_path / "base", seed=1, ancestor=0)
    reports = patch_directory(tmp_path / "tuned", tmp_path / "out", EVERY, ModelPair(world / "chat", tmp_path / "base"))
    assert {r.module for r in reports if r.skipped == "rounded_update"} == {
        r.module for r in reports if LAYER in r.module
    }
    assert sum(report.skipped is None for report in reports) == 7
