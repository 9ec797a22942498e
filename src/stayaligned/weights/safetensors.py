"""Read safetensors files with `pread`: the header as a table of offsets, tensors, and any range of bytes.

The safetensors library maps files into memory and does not give offsets, which streaming blocks of rows needs.
Format: eight bytes of header length (little-endian), a JSON header, the tensors' bytes.
"""

from __future__ import annotations

import json
import math
import os
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from stayaligned.core.errors import StayalignedError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_LONGEST_HEADER = 100 << 20
"""Largest header in bytes; the safetensors library has the same limit."""
_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"), 8),
}
"""{the format's name of a type: bits}, to detect damage; the size of a tensor of another type is not checked."""
_PLAIN_FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""{the format's name of a type that can be streamed: torch's name}, to read headers without importing torch."""


class Entry(NamedTuple):
    """Where and how one tensor is stored."""

    stored_type: str
    """Type by the format's name, such as "BF16"."""
    shape: tuple[int, ...]
    offset: int
    """Offset of the tensor's first byte in the file."""
    size: int
    """Size of the tensor in bytes."""

    @property
    def dtype(self) -> torch.dtype:
        """The type in torch; only of a plain float."""
        import torch

        return getattr(torch, _PLAIN_FLOATS[self.stored_type])

    @property
    def is_plain_float(self) -> bool:
        """Whether the type is fp64, fp32, fp16 or bf16."""
        return self.stored_type in _PLAIN_FLOATS


class SafetensorsFile:
    """An open safetensors file.

    Args:
        path: the file.
        hint: the hint of the error if the file is damaged.

    Raises:
        StayalignedError: if the file is missing, not safetensors, or cut off.
    """

    def __init__(self, path: Path, *, hint: str) -> None:
        self.path = path
        self._hint = hint
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise self._damaged(error.strerror or str(error)) from error
        self._closing = weakref.finalize(self, os.close, self._descriptor)
        self.size = os.fstat(self._descriptor).st_size
        """Size of the file in bytes."""
        self.metadata: dict[str, str] = {}
        self.entries = self._read_header()

    def tensor(self, name: str) -> Tensor:
        """Read a tensor, in the stored type.

        Raises:
            StayalignedError: if the installed safetensors or torch can't read the type.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path, framework="pt") as file:
                return file.get_tensor(name)
        except (SafetensorError, OSError, AttributeError) as error:
            raise StayalignedError(
                f"{self.path}: {name} can't be read as {self.entries[name].stored_type}: {error}",
                hint="Save this tensor in bf16, fp16 or fp32.",
            ) from error

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` with the bytes from `offset` on.

        Raises:
            StayalignedError: if the file is too short.
        """
        filled = 0
        while filled < len(buffer):
            try:
                count = os.preadv(self._descriptor, [buffer[filled:]], offset + filled)
            except OSError as error:
                raise self._damaged(error.strerror or str(error)) from error
            if count == 0:
                raise self._damaged("the file ends early")
            filled += count

    def will_need(self, offset: int, length: int) -> None:
        """Ask the system to read these bytes ahead."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, offset, length, os.POSIX_FADV_WILLNEED)

    def _read_header(self) -> dict[str, Entry]:
        head = bytearray(8)
        if self.size < 8:
            raise self._damaged("the file is shorter than a header")
        self.read_into(memoryview(head), 0)
        length = int.from_bytes(head, "little")
        if length > min(_LONGEST_HEADER, self.size - 8):
            raise self._damaged("the header is longer than the file")
        text = bytearray(length)
        self.read_into(memoryview(text), 8)
        try:
            header = json.loads(text)
            self.metadata = dict(header.pop("__metadata__", None) or {})
            entries = {str(name): self._entry(value, 8 + length) for name, value in header.items()}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise self._damaged(f"the header is invalid ({error})") from error
        end = max((entry.offset + entry.size for entry in entries.values()), default=0)
        if end > self.size:
            raise self._damaged(f"the file has {self.size} bytes, but its header requires {end}")
        return entries

    def _entry(self, value: dict[str, Any], data: int) -> Entry:
        begin, end = (int(offset) for offset in value["data_offsets"])
        kind, shape = str(value["dtype"]), tuple(int(size) for size in value["shape"])
        if min(shape, default=0) < 0 or not 0 <= begin <= end:
            raise ValueError("negative shapes or offsets")
        if kind in _BITS and 8 * (end - begin) != math.prod(shape) * _BITS[kind]:
            raise ValueError("offsets don't match the shape")
        return Entry(kind, shape, data + begin, end - begin)

    def _damaged(self, reason: str) -> StayalignedError:
        return StayalignedError(f"{self.path} can't be read as safetensors: {reason}", hint=self._hint)
