"""Model checkpoints as read-only mappings from names to tensors, and the differences between two of them.

Only safetensors, only what is asked for: a tensor is read from its shard when it is looked up, so comparing two
140 GB checkpoints needs the memory of one weight pair (and of the next, which is read while the first is worked on).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from stayaligned.errors import StayalignedError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_REDOWNLOAD = "The file was cut off or damaged; download or save the checkpoint again."


class Delta(NamedTuple):
    """V of one weight."""

    name: str
    value: Tensor
    """W_aligned - W_base, in fp32 whatever the checkpoints store."""


class Checkpoint(Mapping[str, "Tensor"]):
    """A model directory as a mapping; nothing but headers is read until a tensor is looked up.

    Args:
        directory: where `model.safetensors`, or the index and the shards that it names, lie.

    Raises:
        StayalignedError: if the files are missing, damaged, or don't hold what the index says.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._shards = _shards_of(directory)
        self._open: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Tensor:
        shard, handle = self._locate(name)
        try:
            return handle.get_tensor(name)
        except Exception as error:
            raise _damaged(self.directory / shard, error) from error

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, from the header alone."""
        return tuple(self._locate(name)[1].get_slice(name).get_shape())

    def __contains__(self, name: object) -> bool:
        return name in self._shards  # Mapping's own would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._shards)

    def __len__(self) -> int:
        return len(self._shards)

    def config(self) -> dict[str, Any]:
        """The content of `config.json`.

        Raises:
            StayalignedError: if it is missing or is no JSON object.
        """
        path = self.directory / "config.json"
        return read_json_object(path, hint="A checkpoint is a directory that `save_pretrained` wrote.")

    def _locate(self, name: str) -> tuple[str, Any]:
        shard = self._shards[name]
        if shard not in self._open:
            self._open[shard] = _open_shard(self.directory / shard)
        if name not in self._open[shard].keys():  # noqa: SIM118 - safe_open is no mapping
            raise StayalignedError(
                f"{self.directory / shard} has no tensor {name!r}, which {_INDEX} says it holds", hint=_REDOWNLOAD
            )
        return shard, self._open[shard]


def checkpoint_directory(ref: str | Path) -> Path:
    """The local directory of a checkpoint: `ref` itself, or the snapshot of a hub id (`org/name`, `org/name@revision`).

    A hub id is looked up through huggingface_hub, cache first, and only its safetensors and JSON files are fetched.

    Raises:
        StayalignedError: if there is no such directory and no such hub repository within reach.
    """
    path = Path(ref)
    if path.is_dir():
        return path
    repository, _, revision = str(ref).partition("@")
    if isinstance(ref, Path) or not _HUB_ID.fullmatch(repository):
        raise StayalignedError(
            f"{ref}: no such checkpoint directory", hint="Give a local directory or a hub id such as org/name."
        )
    from huggingface_hub import snapshot_download

    try:
        directory = snapshot_download(
            repository,
            revision=revision or None,
            allow_patterns=["*.safetensors", "*.json"],
            ignore_patterns=["*/*"],  # other layouts of the same weights, `original/` for one
        )
    except (OSError, ValueError) as error:
        raise StayalignedError(
            f"{ref}: neither a directory here nor a hub repository within reach ({type(error).__name__})",
            hint="Check the spelling; offline, run `hf download` beforehand; gated models need `hf auth login`.",
        ) from error
    return Path(directory)


def open_checkpoint(ref: str | Path) -> Checkpoint:
    """The checkpoint at a local directory or hub id."""
    return Checkpoint(checkpoint_directory(ref))


def iter_deltas(
    aligned: Checkpoint, base: Checkpoint, names: Mapping[str, tuple[str, str]] | Sequence[str]
) -> Iterator[Delta]:
    """V = W_aligned - W_base for each name in order, subtracted in fp32, one weight in memory at a time plus the next.

    Args:
        aligned: the aligned checkpoint.
        base: its unaligned ancestor; shards and storage type may differ.
        names: what to compare, or {label: (name in aligned, name in base)} where the two store different names.

    Raises:
        StayalignedError: before the first delta if a name is missing or shaped differently (all of them are listed);
            during the iteration if a shard is damaged; after the last delta if every one was zero.
    """
    pairs = names if isinstance(names, Mapping) else {name: (name, name) for name in names}
    if aligned.directory.resolve() == base.directory.resolve():
        raise StayalignedError(
            f"aligned and base are the same directory, {aligned.directory}", hint="Name two different checkpoints."
        )
    _check_pairs(aligned, base, pairs)
    return _stream(aligned, base, pairs)


def _stream(aligned: Checkpoint, base: Checkpoint, pairs: Mapping[str, tuple[str, str]]) -> Iterator[Delta]:
    any_change = False
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="deltas") as reader:
        labels = iter(pairs)
        label = next(labels, None)
        upcoming = reader.submit(_difference, aligned, base, *pairs[label]) if label is not None else None
        while label is not None and upcoming is not None:
            value, following = upcoming.result(), next(labels, None)
            upcoming = reader.submit(_difference, aligned, base, *pairs[following]) if following is not None else None
            any_change = any_change or bool(value.any())
            yield Delta(label, value)
            label = following
    if pairs and not any_change:
        raise StayalignedError(
            f"{aligned.directory} and {base.directory} hold the same weights: there is no alignment direction",
            hint="`aligned` is the chat or instruct model, `base` its pretrained ancestor.",
        )


def _difference(aligned: Checkpoint, base: Checkpoint, aligned_name: str, base_name: str) -> torch.Tensor:
    import torch

    for checkpoint, name in ((aligned, aligned_name), (base, base_name)):
        if checkpoint[name].dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            raise StayalignedError(
                f"{checkpoint.directory}: {name} is stored as {checkpoint[name].dtype}",
                hint="Quantised weights can't be subtracted; use the checkpoint in bf16, fp16 or fp32.",
            )
    # In-place subtraction promotes bf16 and fp16 to fp32 element by element, without a second fp32 copy.
    value = aligned[aligned_name].to(torch.float32, copy=True).sub_(base[base_name])
    if not bool(torch.isfinite(value).all()):
        raise StayalignedError(
            f"{aligned_name} is not finite in {aligned.directory} or {base.directory}", hint=_REDOWNLOAD
        )
    return value


def _check_pairs(aligned: Checkpoint, base: Checkpoint, pairs: Mapping[str, tuple[str, str]]) -> None:
    missing = [
        f"{label} (not in {checkpoint.directory})"
        for label, names in pairs.items()
        for checkpoint, name in zip((aligned, base), names, strict=True)
        if name not in checkpoint
    ]
    differing: list[str] = []
    for label, (aligned_name, base_name) in pairs.items():
        if aligned_name in aligned and base_name in base:
            shapes = aligned.shape(aligned_name), base.shape(base_name)
            if shapes[0] != shapes[1]:
                differing.append(f"{label} ({'×'.join(map(str, shapes[0]))} against {'×'.join(map(str, shapes[1]))})")
    if missing or differing:
        raise StayalignedError(
            f"aligned {aligned.directory} and base {base.directory} don't match. "
            f"Missing: {', '.join(missing) or 'none'}. Different shape: {', '.join(differing) or 'none'}",
            hint="The base must be the ancestor that the aligned model was trained from.",
        )


def read_json_object(path: Path, *, hint: str) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        StayalignedError: naming the file, if it is missing, no JSON, or no object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StayalignedError(f"{path} can't be read: {error}", hint=hint) from error
    if not isinstance(content, dict):
        raise StayalignedError(f"{path}: expected a JSON object", hint=hint)
    return content


def _shards_of(directory: Path) -> dict[str, str]:
    """{tensor name: file name}."""
    if (directory / _INDEX).is_file():
        weight_map = read_json_object(directory / _INDEX, hint=_REDOWNLOAD).get("weight_map")
        if not isinstance(weight_map, dict):
            raise StayalignedError(f"{directory / _INDEX} has no weight_map", hint=_REDOWNLOAD)
        absent = sorted({shard for shard in weight_map.values() if not (directory / shard).is_file()})
        if absent:
            raise StayalignedError(
                f"{directory / _INDEX} names files that are missing: {', '.join(absent)}", hint=_REDOWNLOAD
            )
        return weight_map
    if (directory / _SINGLE).is_file():
        return dict.fromkeys(_open_shard(directory / _SINGLE).keys(), _SINGLE)
    pickled = any(directory.glob("*.bin"))
    raise StayalignedError(
        f"{directory} holds neither {_SINGLE} nor {_INDEX}",
        hint="Only safetensors are read: load the model once and `save_pretrained` it."
        if pickled
        else "Give a checkpoint directory as `save_pretrained` writes it (not an adapter).",
    )


def _open_shard(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> StayalignedError:
    return StayalignedError(f"{path} can't be read as safetensors: {error}", hint=_REDOWNLOAD)
