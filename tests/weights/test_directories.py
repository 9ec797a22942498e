"""One rule for every command: what a directory holds instead of one model or one adapter is said, with what to give."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from stayaligned.core.errors import StayalignedError
from stayaligned.hf.models import load_finetuned, load_guard, load_model, load_tokenizer
from stayaligned.testing import write_pico_adapter, write_pico_checkpoint
from stayaligned.weights.adapters import read_adapter
from stayaligned.weights.checkpoints import open_checkpoint


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made")
    write_pico_adapter(root / "adapter", write_pico_checkpoint(root / "model", num_hidden_layers=1))
    return root


@pytest.fixture
def model(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made / "model", tmp_path / "model")


@pytest.fixture
def adapter(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made / "adapter", tmp_path / "adapter")


READERS: dict[str, Callable[[Path], object]] = {
    "transformers": load_model,
    "tokenizer": load_tokenizer,
    "judge": load_guard,
    "checkpoint": open_checkpoint,
}
BESIDE = {
    "both": ("adapter_config.json", "adapter_model.safetensors"),
    "pickled": ("adapter_config.json", "adapter_model.bin"),
    "weights only": ("adapter_model.safetensors",),
    "MLX": ("adapter_config.json", "adapters.safetensors"),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", BESIDE)
def test_an_adapter_beside_a_models_weights_is_refused_by_every_reader_of_models(
    model: Path, adapter: Path, kind: str, reader: str
) -> None:
    for name in BESIDE[kind]:
        shutil.copy(
            adapter / ("adapter_config.json" if name.endswith("json") else "adapter_model.safetensors"), model / name
        )
    with pytest.raises(StayalignedError, match="holds a model and an adapter") as caught:
        READERS[reader](model)
    assert "a directory of their own" in str(caught.value.hint)


def test_an_adapter_beside_a_models_weights_is_refused_as_an_adapter_too(model: Path, adapter: Path) -> None:
    for file in adapter.iterdir():
        shutil.copy(file, model)
    for read in (read_adapter, lambda path: load_finetuned(model, path)):
        with pytest.raises(StayalignedError, match="holds a model and an adapter"):
            read(model)


def test_the_configuration_of_a_merged_adapter_is_named_as_left_over(model: Path, adapter: Path) -> None:
    shutil.copy(adapter / "adapter_config.json", model)
    for read in READERS.values():
        with pytest.raises(StayalignedError, match="but no adapter's weights") as caught:
            read(model)
        assert "delete adapter_config.json" in str(caught.value.hint)


def test_an_adapter_named_as_a_model_names_its_model_even_with_the_models_configuration_beside_it(
    made: Path, adapter: Path
) -> None:
    for beside in (False, True):  # some programs save the model's config.json with the adapter
        if beside:
            shutil.copy(made / "model" / "config.json", adapter)
        for read in READERS.values():
            with pytest.raises(StayalignedError, match="is an adapter, not a model") as caught:
                read(adapter)
            assert f"trained on ({made / 'model'})" in str(caught.value.hint)
    assert read_adapter(adapter).tensors


NO_MODEL = {
    "GGUF": ("model.Q4_K_M.gguf",),
    "publisher's own format": ("consolidated.safetensors", "params.json"),
    "ONNX": ("model.onnx",),
    "DeepSpeed": ("zero_to_fp32.py", "latest"),
    "FSDP": ("pytorch_model_fsdp_0/x",),
    "TensorFlow": ("tf_model.h5",),
    "pickled": ("pytorch_model.bin", "optimizer.pt"),
    "interrupted": ("model-00001-of-00004.safetensors",),
    "under other names": ("model.fp16.safetensors",),
    "checkpoint-8": ("checkpoint-8/config.json", "checkpoint-16/config.json", "all_results.json"),
    "hub's cache": ("snapshots/abc/config.json", "refs/main", "blobs/x"),
    "in its subdirectories": ("model/config.json",),
}


@pytest.mark.parametrize("kind", NO_MODEL)
def test_the_error_for_another_format_says_what_it_is(tmp_path: Path, kind: str) -> None:
    for name in NO_MODEL[kind]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for read in (load_model, open_checkpoint):
        with pytest.raises(StayalignedError) as caught:
            read(tmp_path)
        assert kind in str(caught.value.hint)


def test_weights_in_other_formats_beside_safetensors_do_no_harm(model: Path) -> None:
    for name in ("pytorch_model.bin", "model.gguf", "consolidated.safetensors", "optimizer.pt", "original/x.pth"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).touch()
    assert len(open_checkpoint(model)) == len(load_model(model).state_dict())


def test_an_adapter_of_mlx_is_named_with_the_way_out(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapters.safetensors")
    content = {"fine_tune_type": "lora", "lora_parameters": {"rank": 8, "scale": 20.0}, "model": "org/name"}
    (adapter / "adapter_config.json").write_text(json.dumps(content))
    with pytest.raises(StayalignedError, match="of MLX") as caught:
        read_adapter(adapter)
    assert "mlx_lm.fuse" in str(caught.value.hint)
    with pytest.raises(StayalignedError) as caught:
        load_model(adapter)
    assert "org/name" in str(caught.value.hint)


def test_pickled_and_sharded_adapters_are_named_with_the_way_out(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model-00001-of-00002.safetensors")
    for name, said in (("adapter_model.safetensors.index.json", "shards"), ("adapter_model.bin", "pickled")):
        (adapter / name).touch()
        with pytest.raises(StayalignedError, match=r"no adapter_model\.safetensors") as caught:
            read_adapter(adapter)
        assert said in str(caught.value.hint)
        (adapter / name).unlink()


def test_a_file_given_as_a_directory_names_the_directory(model: Path) -> None:
    with pytest.raises(StayalignedError, match="is a file, expected a directory"):
        read_adapter(model / "config.json")


@pytest.mark.parametrize("reader", [load_model, load_guard, open_checkpoint, read_adapter])
def test_a_pointer_of_git_lfs_is_named_with_the_way_out(
    model: Path, adapter: Path, reader: Callable[[Path], object]
) -> None:
    place, name = (adapter, "adapter_model") if reader is read_adapter else (model, "model")
    file = place / f"{name}.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123\n")
    with pytest.raises(StayalignedError, match="is a pointer of Git LFS") as caught:
        reader(place)
    assert "git lfs install" in str(caught.value.hint)
