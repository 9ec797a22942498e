"""Subspace files: V's leading singular triplets for every linear weight of a pair of models, in one shareable file.

A subspace file is enough to project an adapter without either model. It is a safetensors file that holds, for each
module (named as `LoraLayer.name`), the fp32 tensors `{module}.left` (out, k), `{module}.values` (k,) and
`{module}.right` (in, k) of V ≈ U Σ Qᵀ, with V always (out, in); and under the metadata key `stayaligned` a JSON header,
the `SubspaceHeader`. Reading the header does not import torch.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, ValidationError

from stayaligned.core.errors import StayalignedError, first_problem
from stayaligned.core.records import Record
from stayaligned.weights.adapter_config import refuse_slow_patterns
from stayaligned.weights.adapters import Adapter, LoraLayer
from stayaligned.weights.checkpoints import Checkpoint, check_format, is_hub_id, weights_fingerprint
from stayaligned.weights.lora_layout import other_names, plain_layers, translate, under_stored_names
from stayaligned.weights.safetensors import SafetensorsFile
from stayaligned.weights.unsupported import check_factors, list_names, refuse_unsupported

if TYPE_CHECKING:
    from torch import Tensor

    from stayaligned.algorithms.alignment_delta import TruncatedDelta

_KEY = "stayaligned"
_FORMAT = 2
_REBUILD = "Copy or download the file again, or rebuild it: `stayaligned subspace build`."
_USE_MODELS = "Give both models instead: --aligned and --base."


class ModelIdentity(Record):
    """One of the two models that a subspace file was built from."""

    ref: str
    """Directory or hub id, as given."""
    name: str
    """Hub id, or the name in the model's configuration; may be empty."""
    sha256: str
    """`checkpoints.weights_fingerprint` of the model."""

    @property
    def names(self) -> set[str]:
        """All names of the model."""
        return {self.ref, self.name} - {""}

    @property
    def is_hub_id(self) -> bool:
        """Whether it was given as a hub id. The name in a configuration is often that of the model's parent."""
        return is_hub_id(self.name) and self.name == self.ref.partition("@")[0]


class ModuleHeader(Record):
    """What a subspace file states about one module's V."""

    shape: tuple[int, int]
    """Shape of V, (out, in)."""
    transposed: bool
    """Whether the models store the weight as (in, out)."""
    norm: float = Field(ge=0, allow_inf_nan=False)
    """Frobenius norm of the whole V."""
    rank: int = Field(ge=0)
    """Number of stored triplets; 0 if V is zero."""
    captured_energy: float = Field(ge=0, le=1)
    """Share of ‖V‖² that the stored triplets hold."""
    tail: float = Field(ge=0, allow_inf_nan=False)
    """Bound on the largest singular value that the stored triplets leave out."""
    cross: float = Field(ge=0, allow_inf_nan=False)
    """`Tail.cross` of the stored triplets: 0 for exact ones."""
    rounding: bool = False
    """Whether V is only what rounding the weights to another type changes. If so, no triplets are stored."""

    def parts(self) -> dict[str, tuple[int, ...]]:
        """Return {last part of a tensor's name: its shape}, in the order of the file."""
        return {"left": (self.shape[0], self.rank), "values": (self.rank,), "right": (self.shape[1], self.rank)}


class SubspaceHeader(Record):
    """Header of a subspace file."""

    format: int = _FORMAT
    """Number of the file format."""
    aligned: ModelIdentity
    base: ModelIdentity
    rank: int | None
    """Number of triplets per module that was requested; None if a share of ‖V‖² was."""
    energy: float | None
    """Share of ‖V‖² that was requested; None if a number of triplets was."""
    modules: dict[str, ModuleHeader]
    """{module name: its header}, in the order of the model."""
    versions: dict[str, str]
    """Versions of the packages that wrote the file."""


class SubspaceFile:
    """An open subspace file; a module's tensors are read when `delta` is called.

    Args:
        path: a file that `build_subspace` wrote.

    Raises:
        StayalignedError: if it is not a subspace file, is of another format, is cut off, or its header was changed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = SafetensorsFile(path, hint=_REBUILD)
        self.header = self._read_header()

    def delta(self, module: str) -> TruncatedDelta:
        """Read the leading part of a module's V.

        Args:
            module: one of `header.modules`.

        Raises:
            StayalignedError: if the tensors are damaged.
        """
        import torch

        from stayaligned.algorithms.alignment_delta import Tail, TruncatedDelta

        stored = self.header.modules[module]
        sizes = [math.prod(shape) for shape in stored.parts().values()]
        numbers = torch.empty(sum(sizes), dtype=torch.float32)
        self._file.read_into(view_bytes(numbers), self._file.entries[f"{module}.left"].offset)
        parts = numbers.split(sizes)
        left, values, right = (part.view(shape) for part, shape in zip(parts, stored.parts().values(), strict=True))
        delta = TruncatedDelta(left, values, right, stored.norm, Tail(stored.tail, stored.cross), stored.rounding)
        # The squares of k orthonormal columns sum to k; NaN fails every comparison.
        orthonormal = all(abs(float(torch.dot(part, part)) - stored.rank) < 0.1 for part in (parts[0], parts[2]))
        if not (orthonormal and abs(delta.captured_energy - stored.captured_energy) < 1e-5):
            raise StayalignedError(f"{self.path}: the tensors of {module} are damaged", hint=_REBUILD)
        return delta

    def layers_of(self, adapter: Adapter) -> list[LoraLayer]:
        """Return the adapter's layers, by the names and shapes of its tensors.

        Raises:
            StayalignedError: if the adapter is not supported, changes modules that the file does not hold, or can't be
                placed without the model.
        """
        refuse_unsupported(adapter)
        if adapter.config.get("target_parameters"):
            raise StayalignedError(
                f"{adapter.directory}: target_parameters={adapter.config['target_parameters']!r} can't be placed by a "
                "subspace file",
                hint=_USE_MODELS,
            )
        modules = self.header.modules
        refuse_slow_patterns(adapter.directory, adapter.config, modules.keys() | adapter.modules())
        names = other_names(adapter, modules.keys()) or {}
        translated = translate(adapter, names) if names else adapter
        # Layers that layers_to_transform excludes have no tensors.
        by_name = replace(translated, config={**translated.config, "layers_to_transform": None})
        layers = plain_layers(by_name, lambda module: modules[module].shape if module in modules else None)
        if layers is None:
            raise self._unplaced(adapter)
        layers = under_stored_names(layers, names)
        check_factors(adapter, layers, self.path)
        return [replace(layer, transposed=modules[layer.name].transposed) for layer in layers]

    def refuse_mismatch(self, adapter: Adapter) -> str | None:
        """Raise if the adapter was trained on another model than the file's aligned model.

        The weights are compared if the adapter names a local directory, otherwise the names.

        Returns:
            None if it is the file's aligned model; a note for the record if that could not be checked.

        Raises:
            StayalignedError: if it is another model.
        """
        named = adapter.config.get("base_model_name_or_path")
        if not isinstance(named, str) or not named:
            return "not checked whether the adapter was trained on the file's aligned model: the adapter names no model"
        unchecked = f"not checked whether the adapter was trained on the file's aligned model: it names {named}, "
        aligned, base = self.header.aligned, self.header.base
        if Path(named).is_dir():
            found = _fingerprint_of(Path(named))
            if found is None:
                return unchecked + "whose weights can't be compared (quantized, or not safetensors)"
            match, swapped, sure = found == aligned.sha256, found == base.sha256, True
        else:
            match, swapped = named in aligned.names - base.names, named in base.names - aligned.names
            sure = aligned.is_hub_id and is_hub_id(named)
        if match:
            return None
        if swapped:
            raise StayalignedError(
                f"{adapter.directory} was trained on {named}, which is the base and not the aligned model of "
                f"{self.path}",
                hint="If the file was built with aligned and base swapped, rebuild it: `stayaligned subspace build`.",
            )
        if not sure:
            return unchecked + "which is not a local directory"
        raise StayalignedError(
            f"{adapter.directory} was trained on {named}, but {self.path} was built from {aligned.ref}",
            hint="Use the subspace file of that model, or give --aligned and --base. If it is the same model under "
            "another name, correct base_model_name_or_path in a copy of the adapter.",
        )

    def refuse_other_model(self, aligned: Checkpoint) -> None:
        """Raise unless a checkpoint has the weights of the file's aligned model.

        Raises:
            StayalignedError: if its weights differ.
        """
        if weights_fingerprint(aligned) != self.header.aligned.sha256:
            raise StayalignedError(
                f"{aligned.directory} is not the aligned model that {self.path} was built from "
                f"({self.header.aligned.ref})",
                hint="Give the aligned model of the file, or give --base instead of the file.",
            )

    def _unplaced(self, adapter: Adapter) -> StayalignedError:
        """Return the error for an adapter whose layers can't be placed."""
        changed = adapter.modules()
        lacking = sorted(changed - self.header.modules.keys())
        if lacking or not changed:
            return StayalignedError(
                f"{adapter.directory} changes modules that {self.path} does not hold: {list_names(lacking)}. "
                f"It holds: {list_names(list(self.header.modules))}",
                hint="Use the subspace file of the model that the adapter was trained on. Heads, embeddings and "
                "experts under other names are not in subspace files: give --aligned and --base for those.",
            )
        return StayalignedError(
            f"{adapter.directory}: its tensors don't have the shapes that its configuration and {self.path} give",
            hint=f"Use the subspace file of the model that the adapter was trained on. {_USE_MODELS}",
        )

    def _read_header(self) -> SubspaceHeader:
        text = self._file.metadata.get(_KEY)
        if text is None:
            raise StayalignedError(
                f"{self.path} is not a subspace file: it is safetensors without a subspace header", hint=_REBUILD
            )
        try:
            content = json.loads(text)
            check_format(self.path, content, _FORMAT, hint=f"Another version of stayaligned wrote it. {_REBUILD}")
            checksum = content.pop("checksum")
            if checksum != _checksum(content):
                raise self._damaged("its checksum is wrong")
            header = SubspaceHeader.model_validate(content)
        except ValidationError as error:
            raise self._damaged(first_problem(error)) from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise self._damaged(str(error)) from error
        expected = dict(_layout(header.modules))
        begin = min((entry.offset for entry in self._file.entries.values()), default=self._file.size)
        found = {n: (e.stored_type, e.shape, e.offset - begin) for n, e in self._file.entries.items()}
        length = sum(4 * math.prod(shape) for shape, _ in expected.values())
        if found != {n: ("F32", *place) for n, place in expected.items()} or begin + length != self._file.size:
            raise self._damaged("it does not match the tensors")
        return header

    def _damaged(self, reason: str) -> StayalignedError:
        return StayalignedError(f"{self.path}: the header of the subspace file is damaged: {reason}", hint=_REBUILD)


def view_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor as a view."""
    import torch

    return memoryview(tensor.view(-1).view(torch.uint8).numpy().data)


def encode_header(header: SubspaceHeader, length: int | None = None) -> bytes:
    """Return the start of the file, up to the first tensor, padded with spaces to `length` bytes."""
    content = header.model_dump(mode="json")
    content["checksum"] = _checksum(content)
    table: dict[str, Any] = {"__metadata__": {_KEY: json.dumps(content)}}
    for name, (shape, begin) in _layout(header.modules):
        table[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, begin + 4 * math.prod(shape)]}
    text = json.dumps(table, separators=(",", ":")).encode()
    size = 8 * math.ceil(len(text) / 8) if length is None else length - 8
    if len(text) > size:
        raise AssertionError("the header is longer than its reserved room")
    return size.to_bytes(8, "little") + text.ljust(size)


def _layout(modules: Mapping[str, ModuleHeader]) -> Iterator[tuple[str, tuple[tuple[int, ...], int]]]:
    """Yield (tensor name, (shape, offset after the header)) in the order of the file."""
    begin = 0
    for module, stored in modules.items():
        for part, shape in stored.parts().items():
            yield f"{module}.{part}", (shape, begin)
            begin += 4 * math.prod(shape)


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _fingerprint_of(directory: Path) -> str | None:
    """Return the fingerprint of a model directory; None if its weights are quantized or can't be read."""
    try:
        checkpoint = Checkpoint(directory)
        return None if checkpoint.config().get("quantization_config") else weights_fingerprint(checkpoint)
    except StayalignedError:
        return None
