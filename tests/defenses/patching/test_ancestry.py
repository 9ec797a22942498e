"""A wrong base, a wrong aligned model and models of other adapters are refused, or noted if that is asked for."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from stayaligned.core.errors import StayalignedError
from stayaligned.core.files import fingerprint
from stayaligned.defenses import DEFENSES, ModelPair
from stayaligned.defenses.patching.ancestry import check_trained_on
from stayaligned.defenses.patching.directories import patch_directory, read_projection
from stayaligned.defenses.patching.subspace import build_subspace
from stayaligned.weights.adapters import read_adapter
from stayaligned.weights.checkpoints import open_checkpoint, weights_fingerprint
from support.checkpoints import write_family

THRESHOLD = DEFENSES.parse({"name": "safe_lora", "threshold": 0.35})
Q = "model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, `chat`, an `adapter` on chat, the fine-tune `tuned`, and `unrelated`, a model of another seed."""
    return write_family(tmp_path_factory.mktemp("world"))


def edit_weights(directory: Path, change: Any) -> None:
    file = directory / "model.safetensors"
    save_file({name: change(name, value) for name, value in load_file(file).items()}, file, metadata={"format": "pt"})


@pytest.mark.parametrize("source", ["adapter", "tuned"])
def test_a_base_without_a_common_ancestor_is_refused_or_noted(world: Path, tmp_path: Path, source: str) -> None:
    pair = ModelPair(world / "chat", world / "unrelated")
    with pytest.raises(StayalignedError, match=r"have no common ancestor: the cosine of their weights is -?0\.0"):
        patch_directory(world / source, tmp_path / "out", THRESHOLD, pair)
    assert not list(tmp_path.iterdir())
    patch_directory(world / source, tmp_path / "out", THRESHOLD, replace(pair, allow_mismatch=True))
    notes = read_projection(tmp_path / "out" / "projection.json").notes
    assert any("have no common ancestor" in note and "as asked" in note for note in notes)


def test_a_fine_tune_of_another_model_is_refused(world: Path, tmp_path: Path) -> None:
    with pytest.raises(StayalignedError, match=r"chat and fine-tuned .*unrelated have no common ancestor"):
        patch_directory(world / "unrelated", tmp_path / "out", THRESHOLD, ModelPair(world / "chat", world / "base"))
    assert not list(tmp_path.iterdir())


def test_no_subspace_file_is_built_of_unrelated_models(world: Path, tmp_path: Path) -> None:
    with pytest.raises(StayalignedError, match="have no common ancestor"):
        build_subspace(world / "chat", world / "unrelated", tmp_path / "f", rank=2)
    assert not list(tmp_path.iterdir())
    build_subspace(world / "chat", world / "unrelated", tmp_path / "f", rank=2, allow_mismatch=True)


def test_a_base_whose_rows_are_permuted_in_one_layer_is_refused(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "base", tmp_path / "base")
    edit_weights(tmp_path / "base", lambda name, value: value.flip(0) if Q in name else value)
    with pytest.raises(StayalignedError, match=f"are unrelated in 1 of 4 layers .*{Q}"):
        patch_directory(world / "adapter", tmp_path / "out", THRESHOLD, ModelPair(world / "chat", tmp_path / "base"))


def test_noise_as_large_as_the_weights_and_half_precision_are_related(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "chat", tmp_path / "base")
    generator = torch.Generator().manual_seed(0)
    edit_weights(tmp_path / "base", lambda _, v: (v + v.std() * torch.randn(v.shape, generator=generator)).bfloat16())
    patch_directory(world / "adapter", tmp_path / "out", THRESHOLD, ModelPair(world / "chat", tmp_path / "base"))


def copy_of(world: Path, directory: Path, name: str) -> str:
    shutil.copytree(world / name, directory / f"copy-of-{name}")
    return str(directory / f"copy-of-{name}")


def test_a_model_that_is_known_to_be_another_is_refused_and_one_that_is_unknown_noted(
    world: Path, tmp_path: Path
) -> None:
    adapter, models = read_adapter(world / "adapter"), [open_checkpoint(world / name) for name in ("chat", "base")]
    half = copy_of(world, tmp_path, "chat")
    edit_weights(Path(half), lambda _, value: value.bfloat16())
    local, hub = (str(world / "chat"), str(world / "base")), ("org/chat", "org/raw")
    same = [(local, str(world / "chat")), (local, half), (hub, "org/chat"), (("org/chat@v2", "org/raw"), "org/chat")]
    unknown = [
        *((local, named) for named in (None, "", "org/chat", "/nowhere/chat", str(tmp_path))),
        (hub, "unsloth/chat-bnb-4bit"),
        (hub, "unsloth/Meta-Chat-unsloth-bnb-4bit"),
        (hub, "/srv/models/other"),
    ]
    other = [
        *((local, named) for named in (str(world / "tuned"), str(world / "unrelated"), str(world / "base"))),
        (local, copy_of(world, tmp_path, "base")),
        (hub, "org/raw"),
        (hub, "org/other-chat"),
    ]
    for refs, named in same + unknown + other:
        named_so = replace(adapter, config={**adapter.config, "base_model_name_or_path": named})
        if (refs, named) in other:
            with pytest.raises(StayalignedError, match="was trained on") as caught:
                check_trained_on(named_so, *models, refs, allowed=False)
            assert "--allow-mismatch" in str(caught.value.hint)
            assert "as asked" in str(check_trained_on(named_so, *models, refs, allowed=True))
        else:
            note = check_trained_on(named_so, *models, refs, allowed=False)
            assert (note is not None) == ((refs, named) in unknown), (refs, named)
            assert note is None or "not checked" in note


def test_the_hash_in_the_record_of_a_patched_adapter_is_compared(world: Path, tmp_path: Path) -> None:
    pair = ModelPair(world / "chat", world / "base")
    every = DEFENSES.parse({"name": "complement", "rank": 2})
    patch_directory(world / "adapter", tmp_path / "once", every, pair)
    patch_directory(tmp_path / "once", tmp_path / "twice", DEFENSES.parse("safe_lora"), pair)
    config = tmp_path / "once" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": "org/chat"}))
    with pytest.raises(StayalignedError, match="was patched against another aligned model"):
        patch_directory(tmp_path / "once", tmp_path / "out", every, ModelPair(world / "tuned", world / "base"))


def test_files_beside_the_bases_weights_do_not_make_another_base(world: Path, tmp_path: Path) -> None:
    for name in ("chat", "base"):
        shutil.copytree(world / name, tmp_path / name)
    made_from = {
        "inputs": {"base_model": f"sha256:{fingerprint(tmp_path / 'base')}"},
        "base_weights": weights_fingerprint(open_checkpoint(tmp_path / "base")),
    }
    (tmp_path / "chat" / "alignment.json").write_text(json.dumps(made_from))
    (tmp_path / "base" / "README.md").write_text("added later")
    pair = ModelPair(tmp_path / "chat", tmp_path / "base")
    patch_directory(world / "tuned", tmp_path / "right", THRESHOLD, pair)
    edit_weights(tmp_path / "base", lambda name, value: value + 0.01 if Q in name else value)
    with pytest.raises(StayalignedError, match="was aligned from another base") as caught:
        patch_directory(world / "tuned", tmp_path / "out", THRESHOLD, pair)
    assert "the same model in another type" in str(caught.value.hint)


def test_the_base_in_the_record_of_an_alignment_is_compared(world: Path, tmp_path: Path) -> None:
    for name in ("chat", "base"):
        shutil.copytree(world / name, tmp_path / name)
    adapter = tmp_path / "adapter"
    shutil.copytree(world / "adapter", adapter)
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": "org/chat"}))
    made_from = {"inputs": {"base_model": f"sha256:{fingerprint(tmp_path / 'base')}"}}
    (tmp_path / "chat" / "alignment.json").write_text(json.dumps(made_from))
    patch_directory(adapter, tmp_path / "right", THRESHOLD, ModelPair(tmp_path / "chat", tmp_path / "base"))
    with pytest.raises(StayalignedError, match="was aligned from another base"):
        patch_directory(adapter, tmp_path / "out", THRESHOLD, ModelPair(tmp_path / "chat", world / "tuned"))
    with pytest.raises(StayalignedError, match="they look swapped"):
        patch_directory(adapter, tmp_path / "out", THRESHOLD, ModelPair(tmp_path / "base", tmp_path / "chat"))
