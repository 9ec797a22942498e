"""Model checkpoints in safetensors: read-only mappings from names to tensors that read only what is looked up."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from stayaligned.core.errors import StayalignedError
from stayaligned.core.files import parse_json, refuse_unwritable_hub_cache
from stayaligned.weights.directories import (
    MODEL_CONFIG,
    MODEL_INDEX,
    MODEL_WEIGHTS,
    refuse_adapter_files,
    refuse_without_weights,
)
from stayaligned.weights.safetensors import SafetensorsFile

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_RUN_BYTES = 1 << 14
_RUNS = 4
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
REDOWNLOAD = "The file was cut off or damaged; download or save the checkpoint again."
"""Hint for a damaged file."""


class Block(NamedTuple):
    """Rows of a stored 2-D tensor, or of one expert's matrix in a 3-D tensor."""

    name: str
    """Name of the stored tensor."""
    expert: int | None = None
    """Index of the expert in a 3-D tensor; None for a 2-D tensor."""
    first_row: int = 0
    rows: int | None = None
    """Number of rows; None for all rows from `first_row` on."""


Weight = tuple[Block, ...]
"""A matrix as stored: blocks stacked along the rows."""


def whole_tensor(name: str) -> Weight:
    """Return the weight that one 2-D tensor stores."""
    return (Block(name),)


class Checkpoint(Mapping[str, "Tensor"]):
    """A model directory as a mapping of tensors; a tensor is read when it is looked up.

    Args:
        directory: holds `model.safetensors`, or an index and its shards.

    Raises:
        StayalignedError: if the files are missing, damaged, or don't match the index.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._open: dict[str, SafetensorsFile] = {}
        self._lock = threading.Lock()
        self._shards = self._shards_of()

    def __getitem__(self, name: str) -> Tensor:
        return self.file_of(name).tensor(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor; reads only the header."""
        return self.file_of(name).entries[name].shape

    def file_of(self, name: str) -> SafetensorsFile:
        """Return the file that holds a tensor, with its header read and checked."""
        shard = self._shards[name]
        opened = self._file(shard)
        if name not in opened.entries:
            raise StayalignedError(
                f"{self.directory / shard} has no tensor {name!r}, which {MODEL_INDEX} lists", hint=REDOWNLOAD
            )
        return opened

    def shards(self) -> Mapping[str, str]:
        """Return {tensor name: file name}."""
        return self._shards

    def __contains__(self, name: object) -> bool:
        return name in self._shards  # the inherited method would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._shards)

    def __len__(self) -> int:
        return len(self._shards)

    def config(self) -> dict[str, Any]:
        """Return the content of `config.json`.

        Raises:
            StayalignedError: if it is missing or not a JSON object.
        """
        path = self.directory / MODEL_CONFIG
        return read_json_object(path, hint="Give a checkpoint directory that `save_pretrained` wrote.")

    def matrix_shape(self, weight: Weight) -> tuple[int, int]:
        """Return (rows, columns) of a weight as stored.

        Raises:
            StayalignedError: if its blocks are not matrices of plain floats, or differ in width or type.
        """
        spans = self.spans(weight)
        kinds = {(span.columns, span.dtype) for span in spans}
        if len(kinds) != 1:
            names = ", ".join(block.name for block in weight)
            raise StayalignedError(
                f"{self.directory}: {names} are parts of one weight, but differ in width or type",
                hint="Give a checkpoint that `save_pretrained` wrote.",
            )
        return sum(span.rows for span in spans), spans[0].columns

    def spans(self, weight: Weight) -> list[Span]:
        """Return the places of a weight's rows in the files, block by block."""
        return [self._span(block) for block in weight]

    def _span(self, block: Block) -> Span:
        file = self.file_of(block.name)
        entry = file.entries[block.name]
        if len(entry.shape) != (2 if block.expert is None else 3):
            raise StayalignedError(
                f"{self.directory}: {block.name} has the shape {entry.shape}, expected a matrix",
                hint="Give a checkpoint that `save_pretrained` wrote.",
            )
        if not entry.is_plain_float:
            raise StayalignedError(
                f"{self.directory}: {block.name} is stored as {entry.stored_type}",
                hint="Use the model in bf16, fp16 or fp32: quantized weights can't be subtracted.",
            )
        rows, columns = entry.shape[-2:]
        width = columns * entry.dtype.itemsize
        first = (block.expert or 0) * rows + block.first_row
        count = rows - block.first_row if block.rows is None else block.rows
        return Span(file, entry.dtype, entry.offset + first * width, count, columns)

    def _file(self, shard: str) -> SafetensorsFile:
        with self._lock:
            if shard not in self._open:
                self._open[shard] = SafetensorsFile(self.directory / shard, hint=REDOWNLOAD)
            return self._open[shard]

    def _shards_of(self) -> dict[str, str]:
        refuse_adapter_files(self.directory)
        refuse_without_weights(self.directory)
        named = self.config().get("transformers_weights") if (self.directory / MODEL_CONFIG).is_file() else None
        if named not in (None, MODEL_WEIGHTS, MODEL_INDEX):
            raise StayalignedError(
                f"{self.directory / MODEL_CONFIG}: transformers_weights={named!r} names other weights than "
                f"{MODEL_WEIGHTS}",
                hint="Load the model with transformers and save it with `save_pretrained`.",
            )
        if (self.directory / MODEL_WEIGHTS).is_file():  # checked first, as in transformers
            return dict.fromkeys(self._file(MODEL_WEIGHTS).entries, MODEL_WEIGHTS)
        weight_map = read_json_object(self.directory / MODEL_INDEX, hint=REDOWNLOAD).get("weight_map")
        if not isinstance(weight_map, dict):
            raise StayalignedError(f"{self.directory / MODEL_INDEX} has no weight_map", hint=REDOWNLOAD)
        outside = sorted({str(s) for s in weight_map.values() if not isinstance(s, str) or Path(s).name != s})
        if outside:
            raise StayalignedError(
                f"{self.directory / MODEL_INDEX} lists files outside its directory: {', '.join(outside)}",
                hint=REDOWNLOAD,
            )
        absent = sorted({shard for shard in weight_map.values() if not (self.directory / shard).is_file()})
        if absent:
            raise StayalignedError(
                f"{self.directory / MODEL_INDEX} lists files that are missing: {', '.join(absent)}", hint=REDOWNLOAD
            )
        return weight_map


class Span(NamedTuple):
    """Consecutive rows in a file."""

    file: SafetensorsFile
    dtype: torch.dtype
    offset: int
    """Byte offset of the first row."""
    rows: int
    columns: int

    @property
    def size(self) -> int:
        """Size in bytes."""
        return self.rows * self.columns * self.dtype.itemsize


def checkpoint_directory(ref: str | Path) -> Path:
    """Return the directory of a checkpoint: `ref`, or the snapshot of a hub id (`org/name`, `org/name@revision`).

    huggingface_hub looks up a hub id, in its cache first, and downloads only safetensors and JSON files.

    Raises:
        StayalignedError: if there is no such directory, and no such hub repository can be reached.
    """
    path = Path(ref)
    if path.is_dir():
        return path
    repository, _, revision = str(ref).partition("@")
    if isinstance(ref, Path) or not is_hub_id(repository):
        raise StayalignedError(
            f"{ref}: no such checkpoint directory", hint="Give a local directory or a hub id such as org/name."
        )
    from huggingface_hub import snapshot_download

    try:
        directory = snapshot_download(
            repository,
            revision=revision or None,
            allow_patterns=["*.safetensors", "*.json"],
            # the same weights in other layouts
            ignore_patterns=["*/*", "consolidated*.safetensors"],
        )
    except (OSError, ValueError) as error:
        refuse_unwritable_hub_cache(error)
        raise StayalignedError(
            f"{ref}: no such directory, and no hub repository could be reached ({type(error).__name__})",
            hint="Check the spelling; offline, run `hf download` beforehand; for gated models, run `hf auth login`.",
        ) from error
    return Path(directory)


def is_hub_id(name: str) -> bool:
    """Return whether a name has the form `org/name`."""
    return _HUB_ID.fullmatch(name) is not None


def open_checkpoint(ref: str | Path) -> Checkpoint:
    """Open the checkpoint in a local directory or of a hub id."""
    return Checkpoint(checkpoint_directory(ref))


def read_json_object(path: Path, *, hint: str) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        StayalignedError: naming the file, if it is missing, invalid, or holds something else.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise StayalignedError(f"{path} can't be read: {error}", hint=hint) from error
    content = parse_json(text, f"{path} can't be read", hint=hint)
    if not isinstance(content, dict):
        raise StayalignedError(f"{path}: expected a JSON object", hint=hint)
    return content


def check_format(path: Path, content: Mapping[str, Any], expected: int, *, hint: str) -> None:
    """Raise unless the content of a file has the expected format number.

    Raises:
        StayalignedError: naming the file, the found and the expected format.
    """
    found = content.get("format")
    if found != expected:
        number = f"format {found!r}" if "format" in content else "no format number"
        raise StayalignedError(f"{path} has {number}, expected format {expected}", hint=hint)


def weights_fingerprint(checkpoint: Checkpoint) -> str:
    """Return the SHA-256 of the names, types, shapes and content of all tensors; it does not depend on the sharding.

    Of tensors above 64 KiB, four runs of 16 KiB are read, from the first to the last byte: reading a 140 GB checkpoint
    to identify it would take minutes, and training changes every part of a weight.
    """
    return tensors_fingerprint({name: checkpoint.file_of(name) for name in sorted(checkpoint)})


def tensors_fingerprint(files: Mapping[str, SafetensorsFile]) -> str:
    """Return the fingerprint of tensors, given {name: the file that holds the tensor}."""
    digest = hashlib.sha256()
    for name, file in files.items():
        entry = file.entries[name]
        digest.update(json.dumps([name, entry.stored_type, entry.shape]).encode())
        sampled = entry.size > _RUNS * _RUN_BYTES
        buffer = bytearray(_RUN_BYTES if sampled else entry.size)
        for run in range(_RUNS if sampled else 1):
            file.read_into(memoryview(buffer), entry.offset + (entry.size - len(buffer)) * run // (_RUNS - 1))
            digest.update(buffer)
    return digest.hexdigest()
