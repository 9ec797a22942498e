"""Subspace files: V's leading singular triplets for every linear weight of a pair of models, in one shareable file.

With such a file an adapter is projected without either model. It is a safetensors file: per module, named as
`LoraLayer.name`, the tensors `{module}.left` (out, k), `{module}.values` (k,) and `{module}.right` (in, k), fp32, of
V ≈ U Σ Qᵀ with V (out, in) whatever the models store; and under the metadata key `stayaligned` a JSON header, the
`SubspaceHeader`. Reading the header imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationError

from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import Record
from stayaligned.weights.adapters import Adapter, LoraLayer
from stayaligned.weights.checkpoints import Checkpoint, is_hub_id, weights_fingerprint
from stayaligned.weights.lora_layout import PREFIX, plain_layers
from stayaligned.weights.safetensors import SafetensorsFile
from stayaligned.weights.unsupported import check_factors, refuse_unsupported, some

if TYPE_CHECKING:
    from torch import Tensor

    from stayaligned.algorithms.alignment_delta import TruncatedDelta

_KEY = "stayaligned"
_WAY_OUT = "Copy or download the file again, or build it anew: `stayaligned subspace build`."
_USE_MODELS = "Name both models instead: --aligned and --base."


class ModelIdentity(Record):
    """One of the two models that a file was built from."""

    ref: str
    """As it was named: a directory or a hub id."""
    name: str
    """The hub id, or the name in the model's configuration; may be empty."""
    sha256: str
    """`checkpoints.weights_fingerprint` of its tensors."""

    @property
    def names(self) -> set[str]:
        """Everything that it is called."""
        return {self.ref, self.name} - {""}

    @property
    def is_hub_id(self) -> bool:
        """Whether it was named by a hub id; names in configurations are often those of a model's parent."""
        return is_hub_id(self.name) and self.name == self.ref.partition("@")[0]


class ModuleHeader(Record):
    """What a file says about one module's V."""

    shape: tuple[int, int]
    """(out, in)."""
    transposed: bool
    """Whether the models store the weight as (in, out)."""
    norm: float = Field(ge=0, allow_inf_nan=False)
    """‖V‖_F of the whole V."""
    rank: int = Field(ge=0)
    """Stored triplets; 0 where V is zero."""
    captured_energy: float = Field(ge=0, le=1)
    """Their share of ‖V‖²."""

    def parts(self) -> dict[str, tuple[int, ...]]:
        """{last part of a tensor's name: its shape}, as they lie one behind the other."""
        return {"left": (self.shape[0], self.rank), "values": (self.rank,), "right": (self.shape[1], self.rank)}


class SubspaceHeader(Record):
    """What a subspace file says about itself."""

    format: Literal[1] = 1
    aligned: ModelIdentity
    base: ModelIdentity
    rank: int | None
    """The number of triplets asked for, or None."""
    energy: float | None
    """The share of ‖V‖² asked for, or None."""
    modules: dict[str, ModuleHeader]
    """In the order of the model."""
    versions: dict[str, str]


class SubspaceFile:
    """A subspace file, opened; tensors are read when they are asked for.

    Args:
        path: what `build_subspace` wrote.

    Raises:
        StayalignedError: if it is no subspace file, is cut off, or its header was changed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = SafetensorsFile(path, hint=_WAY_OUT)
        self.header = self._read_header()
        """What the file says about itself."""

    def delta(self, module: str) -> TruncatedDelta:
        """V's leading part.

        Args:
            module: one of `header.modules`.

        Raises:
            StayalignedError: if the numbers in the file are damaged.
        """
        import torch

        from stayaligned.algorithms.alignment_delta import TruncatedDelta

        stored = self.header.modules[module]
        sizes = [math.prod(shape) for shape in stored.parts().values()]
        numbers = torch.empty(sum(sizes), dtype=torch.float32)
        self._file.read_into(bytes_of(numbers), self._file.entries[f"{module}.left"].offset)
        parts = numbers.split(sizes)
        left, values, right = (part.view(shape) for part, shape in zip(parts, stored.parts().values(), strict=True))
        delta = TruncatedDelta(left, values, right, stored.norm)
        # Orthonormal columns have k as their sum of squares; NaN fails all three.
        orthonormal = all(abs(float(torch.dot(part, part)) - stored.rank) < 0.1 for part in (parts[0], parts[2]))
        if not (orthonormal and abs(delta.captured_energy - stored.captured_energy) < 1e-5):
            raise StayalignedError(f"{self.path}: the tensors of {module} are damaged", hint=_WAY_OUT)
        return delta

    def layers_of(self, adapter: Adapter) -> list[LoraLayer]:
        """The adapter's layers, by the names and shapes of its tensors.

        Raises:
            StayalignedError: if the adapter uses what is not supported, or changes what the file does not hold, or if
                it takes the model to tell what it changes.
        """
        refuse_unsupported(adapter)
        if adapter.config.get("target_parameters"):
            raise StayalignedError(
                f"{adapter.directory}: target_parameters={adapter.config['target_parameters']!r}: which experts these "
                "are can't be told from a subspace file",
                hint=_USE_MODELS,
            )
        modules = self.header.modules
        # What layers_to_transform leaves out has no tensors.
        by_name = replace(adapter, config={**adapter.config, "layers_to_transform": None})
        layers = plain_layers(by_name, lambda module: modules[module].shape if module in modules else None)
        if layers is None:
            raise self._unplaced(adapter)
        check_factors(adapter, layers, self.path)
        return [replace(layer, transposed=modules[layer.name].transposed) for layer in layers]

    def refuse_mismatch(self, adapter: Adapter) -> str | None:
        """Refuse an adapter that was trained on another model than the file's aligned one.

        The weights are compared where the adapter's model is a directory here, else its name.

        Returns:
            None if it is that model; a sentence for the record if that could not be found out.

        Raises:
            StayalignedError: if it is another model.
        """
        named = adapter.config.get("base_model_name_or_path")
        if not isinstance(named, str) or not named:
            return "the adapter does not name its model: it was not checked that it is the aligned model of the file"
        unchecked = f"the adapter names {named}, %s: it was not checked that it is the aligned model of the file"
        aligned, base = self.header.aligned, self.header.base
        if Path(named).is_dir():
            found = _fingerprint_of(Path(named))
            if found is None:
                return unchecked % "whose weights can't be compared (quantized, or no safetensors)"
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
                hint="Was the file built with aligned and base swapped? Build it anew.",
            )
        if not sure:
            return unchecked % "which is not here"
        raise StayalignedError(
            f"{adapter.directory} was trained on {named}, but {self.path} was built from {aligned.ref}",
            hint="Use the file of that model, or name --aligned and --base. If it is the same model under another "
            "name, correct base_model_name_or_path in a copy of the adapter.",
        )

    def refuse_other_model(self, aligned: Checkpoint) -> None:
        """Raise unless a checkpoint has the weights of the file's aligned model.

        Raises:
            StayalignedError: then.
        """
        if weights_fingerprint(aligned) != self.header.aligned.sha256:
            raise StayalignedError(
                f"{aligned.directory} is not the aligned model that {self.path} was built from "
                f"({self.header.aligned.ref})",
                hint="Name the model of the file, or --base in place of the file.",
            )

    def _unplaced(self, adapter: Adapter) -> StayalignedError:
        """Why the adapter's layers can't be told."""
        changed = {key.removeprefix(PREFIX).partition(".lora_")[0] for key in adapter.tensors if ".lora_" in key}
        lacking = sorted(changed - self.header.modules.keys())
        if lacking or not changed:
            return StayalignedError(
                f"{adapter.directory} changes modules that {self.path} does not hold: {some(lacking)}. "
                f"It holds: {some(list(self.header.modules))}",
                hint="Is this the file of the model that the adapter was trained on? Heads, embeddings and experts "
                "under other names are not in subspace files: name --aligned and --base for those.",
            )
        return StayalignedError(
            f"{adapter.directory}: its tensors don't have the shapes that its configuration and {self.path} give",
            hint=f"Is this the file of the model that the adapter was trained on? {_USE_MODELS}",
        )

    def _read_header(self) -> SubspaceHeader:
        text = self._file.metadata.get(_KEY)
        if text is None:
            raise StayalignedError(
                f"{self.path} is no subspace file: it is safetensors without the header of one", hint=_WAY_OUT
            )
        try:
            content = json.loads(text)
            checksum = content.pop("checksum")
            if checksum != _checksum(content):
                raise self._damaged("it was edited, or damaged")
            header = SubspaceHeader.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise self._damaged(f"{where}: {first['msg']} (written by another version?)") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._damaged(str(error)) from error
        expected = dict(_layout(header.modules))
        begin = min((entry.offset for entry in self._file.entries.values()), default=self._file.size)
        found = {n: (e.stored_type, e.shape, e.offset - begin) for n, e in self._file.entries.items()}
        length = sum(4 * math.prod(shape) for shape, _ in expected.values())
        if found != {n: ("F32", *place) for n, place in expected.items()} or begin + length != self._file.size:
            raise self._damaged("the tensors are not those that it names")
        return header

    def _damaged(self, reason: str) -> StayalignedError:
        return StayalignedError(f"{self.path}: the header of the subspace file can't be used: {reason}", hint=_WAY_OUT)


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, as a view."""
    import torch

    return memoryview(tensor.view(-1).view(torch.uint8).numpy().data)


def encoded(header: SubspaceHeader, length: int | None = None) -> bytes:
    """The beginning of the file, up to the first tensor; filled up with spaces to `length` bytes."""
    content = header.model_dump(mode="json")
    content["checksum"] = _checksum(content)
    table: dict[str, Any] = {"__metadata__": {_KEY: json.dumps(content)}}
    for name, (shape, begin) in _layout(header.modules):
        table[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, begin + 4 * math.prod(shape)]}
    text = json.dumps(table, separators=(",", ":")).encode()
    size = 8 * math.ceil(len(text) / 8) if length is None else length - 8
    if len(text) > size:
        raise AssertionError("the header outgrew its reserved room")
    return size.to_bytes(8, "little") + text.ljust(size)


def _layout(modules: Mapping[str, ModuleHeader]) -> Iterator[tuple[str, tuple[tuple[int, ...], int]]]:
    """(tensor name, (its shape, where it begins behind the header)), one behind the other."""
    begin = 0
    for module, stored in modules.items():
        for part, shape in stored.parts().items():
            yield f"{module}.{part}", (shape, begin)
            begin += 4 * math.prod(shape)


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _fingerprint_of(directory: Path) -> str | None:
    """The fingerprint of a model directory, None if its weights are quantized or can't be read."""
    try:
        checkpoint = Checkpoint(directory)
        return None if checkpoint.config().get("quantization_config") else weights_fingerprint(checkpoint)
    except StayalignedError:
        return None
