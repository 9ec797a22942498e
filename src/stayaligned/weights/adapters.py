"""LoRA adapters in PEFT's format: immutable values, read from and written to directories. Imports no PEFT.

`hf.placement.layers.place_adapter` determines an adapter's layers and their tensors; this module holds the tensors.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from stayaligned.core.errors import StayalignedError
from stayaligned.core.files import copyable_files, write_text
from stayaligned.weights.adapter_config import read_adapter_config
from stayaligned.weights.directories import ADAPTER_CONFIG, ADAPTER_WEIGHTS, refuse_unless_adapter

if TYPE_CHECKING:
    from torch import Tensor

    from stayaligned.algorithms.safe_lora import LoraFactors

PREFIX = "base_model.model."
"""Prefix that PEFT adds to the name of a module."""
_WITH_ADAPTER_NAME = re.compile(r"(\.lora_\w+)\.default(?=(\.weight|\.bias)?$)")
"""Found in the names of tensors that were saved without PEFT, of an adapter named "default"; PEFT reads them, too."""
_OF_WRAPPERS = re.compile(
    r"^(?:module\.|_orig_mod\.|base_model\.model\.)+(?=.)|\b(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
"""Found in the names of tensors that were saved from a wrapped model, after the prefix."""
_COPIED_SUFFIXES = frozenset({".json", ".jinja", ".txt", ".model", ".md"})
"""Suffixes of files to copy with an adapter: tokenizer, chat template, model card."""
_SMALL_IN_FP16 = 2.0**-8
"""Largest absolute value below which a B would lose precision in fp16, whose full precision ends at 2⁻¹⁴."""
_NOT_COPIED = frozenset({ADAPTER_CONFIG, "projection.json", "trainer_state.json"})


@dataclass(frozen=True, slots=True)
class LoraLayer:
    """One low-rank update of one weight matrix: its place, its scaling and its tensors.

    An adapter on a stack of experts has one layer per expert. PEFT stores the factors of all experts in two tensors: A
    as (experts · rank, in) with each expert's rows together, B as (out, rank · experts) with the experts interleaved.
    """

    name: str
    """Unique name: a module, `model.layers.0.mlp.up_proj`, or an expert, `model.layers.0.mlp.experts.down_proj[3]`."""
    parameter: str
    """Parameter of the model that the layer changes, `model.layers.0.self_attn.q_proj.weight`."""
    a_key: str
    """Name of A in the adapter's file."""
    b_key: str
    """Name of B in the adapter's file."""
    rank: int
    scaling: float
    """Factor s of the update s·BA."""
    in_features: int
    out_features: int
    transposed: bool = False
    """Whether the model stores the weight as (in, out), as GPT-2's Conv1D and embeddings do."""
    expert: int | None = None
    """Index of the expert; None if the weight is not a stack of experts."""
    experts: int = 1
    """Number of experts in the stack."""


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """A LoRA adapter: its configuration and tensors as stored. Immutable; changing it returns a new adapter."""

    config: Mapping[str, Any]
    """Content of `adapter_config.json`."""
    tensors: Mapping[str, Tensor]
    """{name in `adapter_model.safetensors`: tensor in the stored dtype}."""
    directory: Path
    """Directory that the adapter was read from."""

    def modules(self) -> set[str]:
        """Return the names of the modules that have factors, as the adapter's file states them."""
        return {key.removeprefix(PREFIX).partition(".lora_")[0] for key in self.tensors if ".lora_" in key}

    def factors(self, layer: LoraLayer) -> LoraFactors:
        """Return the layer's A, B and scaling, in fp32."""
        import torch

        from stayaligned.algorithms.safe_lora import LoraFactors

        a, b = self._slices(self.tensors, layer)
        return LoraFactors(a.to(torch.float32), b.to(torch.float32), layer.scaling)

    @staticmethod
    def _slices(tensors: Mapping[str, Tensor], layer: LoraLayer) -> tuple[Tensor, Tensor]:
        """Return the layer's parts of A and B as views."""
        a, b = tensors[layer.a_key], tensors[layer.b_key]
        if layer.expert is None:
            return a, b
        stacked = b.view(layer.out_features, layer.rank, layer.experts)
        return a.view(layer.experts, layer.rank, layer.in_features)[layer.expert], stacked[:, :, layer.expert]

    def to_stored_dtype(self, layer: LoraLayer, factors: LoraFactors) -> LoraFactors:
        """Convert factors to the dtypes in which the adapter stores the layer, on the CPU.

        An operator may shrink B a thousandfold, and fp16 loses the precision of small numbers: a power of two then
        moves from A to B, which does not change BA.
        """
        import torch

        from stayaligned.algorithms.safe_lora import LoraFactors

        a, b = factors.a.to("cpu"), factors.b.to("cpu")
        if self.tensors[layer.b_key].dtype == torch.float16:
            sizes = [float(tensor.abs().max()) for tensor in (a, b)]
            if 0 < sizes[1] < _SMALL_IN_FP16 and sizes[0] > sizes[1]:
                moved = 2.0 ** math.floor(math.log2(sizes[0] / sizes[1]) / 2)
                a, b = a / moved, b * moved
        return LoraFactors(
            a.to(self.tensors[layer.a_key].dtype), b.to(self.tensors[layer.b_key].dtype), factors.scaling
        )

    def with_factors(self, changed: Mapping[LoraLayer, LoraFactors]) -> Adapter:
        """Return an adapter with new factors in the given layers, in the stored dtypes; other tensors are shared.

        Raises:
            StayalignedError: if a new factor overflows the dtype (65504 is the largest number of fp16).
        """
        tensors = dict(self.tensors)
        for layer, factors in changed.items():
            for key in (layer.a_key, layer.b_key):
                if tensors[key] is self.tensors[key]:
                    tensors[key] = self.tensors[key].contiguous().clone()
            for place, value in zip(self._slices(tensors, layer), (factors.a, factors.b), strict=True):
                place.copy_(value)
                if not all_finite(place):
                    raise StayalignedError(
                        f"{layer.name}: the changed factors overflow {place.dtype}",
                        hint="Save the adapter in fp32 or bf16 first.",
                    )
        return replace(self, tensors=MappingProxyType(tensors))


def all_finite(tensor: Tensor) -> bool:
    """Return whether no value is NaN or infinite. A finite sum proves it at a tenth of the cost."""
    import torch

    return bool(tensor.sum(dtype=torch.float32).isfinite()) or bool(tensor.isfinite().all())


def read_adapter(path: Path) -> Adapter:
    """Read an adapter from a directory that PEFT's `save_pretrained` wrote.

    Raises:
        StayalignedError: if there is no adapter, or it is not a LoRA, has pickled weights, or is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    refuse_unless_adapter(path)
    config = read_adapter_config(path)
    if config.get("peft_type") != "LORA":
        raise StayalignedError(
            f"{path / ADAPTER_CONFIG}: peft_type is {config.get('peft_type')!r}, expected 'LORA'",
            hint="Convert the adapter to LoRA first, by PEFT's `convert_to_lora`.",
        )
    try:
        tensors = load_file(path / ADAPTER_WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise StayalignedError(
            f"{path / ADAPTER_WEIGHTS} can't be read as safetensors: {error}",
            hint="The file is damaged; save the adapter again.",
        ) from error
    tensors = {_WITH_ADAPTER_NAME.sub(r"\1", key): tensor for key, tensor in tensors.items()}
    for key in tensors:
        expected = PREFIX + _OF_WRAPPERS.sub("", key.removeprefix(PREFIX))
        if ".lora_" in key and key != expected:
            raise StayalignedError(
                f"{path / ADAPTER_WEIGHTS}: PEFT would ignore {key}, because it expects the name {expected}",
                hint="The file is of a model that was wrapped, compiled or converted. Save it with `save_pretrained` "
                "of the PeftModel itself, or rename the tensors.",
            )
    return Adapter(MappingProxyType(config), MappingProxyType(tensors), path)


def write_adapter(adapter: Adapter, directory: Path, *, notes: Mapping[str, str] | None = None) -> None:
    """Write a PEFT adapter into a directory, with copies of the tokenizer and the model card beside the original.

    Args:
        adapter: the adapter.
        directory: an empty directory.
        notes: more text files to write, {file name: content}.

    Raises:
        OSError: if the disk is full.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(adapter.tensors), directory / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(None, f"{ADAPTER_WEIGHTS}: {error}") from error
    write_text(directory / ADAPTER_CONFIG, json.dumps(dict(adapter.config), indent=2, ensure_ascii=False))
    for file in copyable_files(adapter.directory, _is_copied)[0]:
        shutil.copyfile(file, directory / file.name)
    for name, text in (notes or {}).items():
        write_text(directory / name, text)


def notes_on_copies(path: Path) -> list[str]:
    """Return a note for each file of an adapter's directory that `write_adapter` would copy, but must not."""
    return copyable_files(path, _is_copied)[1]


def _is_copied(name: str) -> bool:
    return Path(name).suffix in _COPIED_SUFFIXES and name not in _NOT_COPIED


def is_adapter(path: Path) -> bool:
    """Return whether a directory holds a PEFT adapter."""
    return (path / ADAPTER_CONFIG).is_file()
