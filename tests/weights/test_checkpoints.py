"""Checkpoints as mappings, and the errors for damaged checkpoints."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from stayaligned.core.errors import StayalignedError
from stayaligned.weights.checkpoints import (
    Checkpoint,
    checkpoint_directory,
    open_checkpoint,
    weights_fingerprint,
    whole_tensor,
)
from support.checkpoints import INDEX, pair, weights, write


def test_only_headers_are_read_until_a_tensor_is_looked_up(tmp_path: Path) -> None:
    directory = write(tmp_path / "a", weights(0), shards=3)
    checkpoint = Checkpoint(directory)
    (directory / "model-00002-of-00003.safetensors").unlink()
    assert "layers.1.weight" in checkpoint
    assert checkpoint.shape("layers.0.weight") == (3, 4)
    with pytest.raises(StayalignedError, match="model-00002-of-00003"):
        checkpoint["layers.1.weight"]


def test_unknown_names_are_key_errors(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        pair(tmp_path)[0]["nope"]


@pytest.mark.parametrize("length", [0, 4, 40, 0.5, 0.99])
def test_a_truncated_shard_is_named(tmp_path: Path, length: float) -> None:
    directory = write(tmp_path / "a", weights(0), shards=2)
    shard = directory / "model-00002-of-00002.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[: int(length * len(content)) if isinstance(length, float) else length])
    with pytest.raises(StayalignedError, match="model-00002-of-00002") as caught:
        list(Checkpoint(directory).items())
    assert "again" in str(caught.value.hint)


def test_an_index_that_lists_missing_tensors_or_files_is_an_error(tmp_path: Path) -> None:
    directory = write(tmp_path / "a", weights(0), shards=2)
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"]["ghost"] = "model-00001-of-00002.safetensors"
    (directory / INDEX).write_text(json.dumps(index))
    with pytest.raises(StayalignedError, match="ghost"):
        Checkpoint(directory)["ghost"]
    (directory / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(StayalignedError, match="files that are missing: model-00001"):
        Checkpoint(directory)


@pytest.mark.parametrize("index", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_a_malformed_index_is_named(tmp_path: Path, index: str) -> None:
    directory = write(tmp_path / "a", weights(0), shards=2)
    (directory / INDEX).write_text(index)
    with pytest.raises(StayalignedError, match="index"):
        Checkpoint(directory)


def test_pickled_checkpoints_are_refused_with_a_fix(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(StayalignedError) as caught:
        Checkpoint(tmp_path)
    assert "safetensors" in str(caught.value.hint)


def test_local_directories_are_used_directly_and_hub_ids_are_found_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert checkpoint_directory(str(tmp_path)) == tmp_path
    commit = "a" * 40
    repository = tmp_path / "models--org--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots").mkdir()
    snapshot = write(repository / "snapshots" / commit, weights(0))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert checkpoint_directory("org/name") == snapshot
    assert len(open_checkpoint("org/name")) == 5


@pytest.mark.parametrize("ref", ["no-such-directory", "./no/such", "org/absent", "org/na me", Path("org/name")])
def test_the_error_names_what_is_neither_a_directory_nor_a_hub_repository(ref: str | Path) -> None:
    with pytest.raises(StayalignedError, match=str(ref)):
        checkpoint_directory(ref)


def test_fingerprints_distinguish_names_types_shapes_and_every_sampled_number(tmp_path: Path) -> None:
    large = torch.arange(300 * 300, dtype=torch.float32).view(300, 300)

    def of(**tensors: torch.Tensor) -> str:
        directory = tmp_path / str(len(list(tmp_path.iterdir())))
        directory.mkdir()
        save_file(tensors, directory / "model.safetensors")
        return weights_fingerprint(Checkpoint(directory))

    first, last = large.clone(), large.clone()
    first[0, 0], last[-1, -1] = -1, -1
    tiny = torch.zeros(2, 3)
    found = [
        of(x=large),
        of(y=large),
        of(x=first),
        of(x=last),
        of(x=large.view(150, 600)),
        of(x=large.view(torch.int32)),
        of(x=large, y=tiny),
        of(x=large, y=tiny + 1),
        of(x=large, y=torch.zeros(0)),
    ]
    assert len(set(found)) == len(found)
    assert of(x=large.clone()) == found[0]


NEW_TYPES = {"F8_E8M0": 16, "F4": 8, "F6_E2M3": 12, "C64": 128, "OF_A_LATER_VERSION": 5}


@pytest.mark.parametrize("kind", NEW_TYPES)
def test_a_tensor_of_another_type_is_an_error_only_where_it_is_needed(tmp_path: Path, kind: str) -> None:
    directory = write(tmp_path / "a", weights(0))
    file = directory / "model.safetensors"
    content, size = file.read_bytes(), NEW_TYPES[kind]
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    header["scale"] = {"dtype": kind, "shape": [4, 4], "data_offsets": [len(data), len(data) + size]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text + data + b"\x7f" * size)
    checkpoint = Checkpoint(directory)
    assert len(checkpoint) == 6
    assert checkpoint.matrix_shape(whole_tensor("layers.0.weight")) == (3, 4)
    assert checkpoint.shape("scale") == (4, 4)
    assert weights_fingerprint(checkpoint)
    with pytest.raises(StayalignedError, match=f"scale is stored as {kind}") as caught:
        checkpoint.matrix_shape(whole_tensor("scale"))
    assert "bf16" in str(caught.value.hint)
