"""PEFT-format LoRA adapters as values, read from and written to directories. Imports no PEFT.

What a layer is, and which tensors make it, is found by `hf.layers.place_adapter`; this module only keeps the bytes.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from stayaligned.core.errors import StayalignedError
from stayaligned.core.files import write_text
from stayaligned.weights.checkpoints import read_json_object

if TYPE_CHECKING:
    from torch import Tensor

    from stayaligned.algorithms.safe_lora import LoraFactors

_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_BESIDE = frozenset({".json", ".jinja", ".txt", ".model", ".md"})
"""Endings of what belongs to an adapter besides its weights: tokenizer, chat template, model card."""
_SMALL_IN_FP16 = 2.0**-8
"""Below it a B loses digits: fp16's full precision ends at 2⁻¹⁴."""
_NOT_BESIDE = frozenset({_CONFIG, "projection.json", "trainer_state.json"})


@dataclass(frozen=True, slots=True)
class LoraLayer:
    """One low-rank update of one weight matrix: where it sits, its scaling, and the tensors that it is made of.

    An adapter on a stack of experts is one layer an expert: PEFT keeps the factors of all of them in two tensors, A as
    (experts · rank, in) with an expert's rows together, B as (out, rank · experts) with the experts interleaved.
    """

    name: str
    """Unique: the module, `model.layers.0.self_attn.q_proj`; of an expert `model.layers.0.mlp.experts.down_proj[3]`."""
    parameter: str
    """The parameter of the model that it changes, `model.layers.0.self_attn.q_proj.weight`."""
    a_key: str
    b_key: str
    rank: int
    scaling: float
    in_features: int
    out_features: int
    transposed: bool = False
    """Whether the model stores the weight as (in, out), as GPT-2's Conv1D and embeddings do."""
    expert: int | None = None
    experts: int = 1


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """A LoRA adapter: configuration and tensors as they are on disk. Changing it makes a new one."""

    config: Mapping[str, Any]
    """The content of `adapter_config.json`."""
    tensors: Mapping[str, Tensor]
    """By their names in `adapter_model.safetensors`, in the stored dtype."""
    directory: Path
    """Where it was read from."""

    def factors(self, layer: LoraLayer) -> LoraFactors:
        """The layer's A, B and scaling, in fp32."""
        import torch

        from stayaligned.algorithms.safe_lora import LoraFactors

        a, b = self._slices(self.tensors, layer)
        return LoraFactors(a.to(torch.float32), b.to(torch.float32), layer.scaling)

    @staticmethod
    def _slices(tensors: Mapping[str, Tensor], layer: LoraLayer) -> tuple[Tensor, Tensor]:
        """The parts of A and B that are this layer's, as views."""
        a, b = tensors[layer.a_key], tensors[layer.b_key]
        if layer.expert is None:
            return a, b
        stacked = b.view(layer.out_features, layer.rank, layer.experts)
        return a.view(layer.experts, layer.rank, layer.in_features)[layer.expert], stacked[:, :, layer.expert]

    def stored(self, layer: LoraLayer, factors: LoraFactors) -> LoraFactors:
        """Factors in the dtype in which the adapter keeps the layer's, on the CPU.

        An operator may shrink B a thousandfold, and fp16 has no small numbers: there a power of two moves from A to B,
        which leaves BA as it is.
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
        """An adapter with new A and B in the given layers, stored in the dtype that they had; the rest is shared.

        Raises:
            StayalignedError: if a new factor does not fit the dtype (fp16 ends at 65504).
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
    """Whether no value is NaN or infinite. The sum tells at a tenth of the cost, unless it overflows itself."""
    import torch

    return bool(tensor.sum(dtype=torch.float32).isfinite()) or bool(tensor.isfinite().all())


def read_adapter(path: Path) -> Adapter:
    """Read a directory that PEFT's `save_pretrained` wrote.

    Raises:
        StayalignedError: if it is no such directory, is not LoRA, holds pickled weights, or is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_dir():
        raise StayalignedError(f"{path}: no such directory", hint="Give the directory of a PEFT adapter.")
    if (path / "config.json").is_file() and not is_adapter(path):
        raise StayalignedError(
            f"{path} is a whole model, expected an adapter",
            hint="`project` takes a fully fine-tuned checkpoint alone, not among adapters, and `--scan` takes none.",
        )
    if not is_adapter(path):
        nested = sorted(child.parent.name for child in path.glob(f"*/{_CONFIG}"))
        raise StayalignedError(
            f"{path} is no adapter: it has no {_CONFIG}",
            hint=f"PEFT saves a named adapter in a folder of its name, here {', '.join(str(path / n) for n in nested)}."
            if nested
            else "Give the directory that `save_pretrained` of a PEFT model wrote.",
        )
    config = read_json_object(path / _CONFIG, hint="The file is damaged; save the adapter again.")
    if config.get("peft_type") != "LORA":
        raise StayalignedError(
            f"{path / _CONFIG}: peft_type is {config.get('peft_type')!r}, expected 'LORA'",
            hint="Other adapters can be converted first: peft's `convert_to_lora`.",
        )
    if not (path / _WEIGHTS).is_file():
        raise StayalignedError(
            f"{path} has no {_WEIGHTS}",
            hint="Pickled weights (.bin) are not read: load the adapter with PEFT and save it again, as safetensors.",
        )
    try:
        tensors = load_file(path / _WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise StayalignedError(
            f"{path / _WEIGHTS} can't be read as safetensors: {error}", hint="The file was cut off; save it again."
        ) from error
    return Adapter(MappingProxyType(config), MappingProxyType(tensors), path)


def write_adapter(adapter: Adapter, directory: Path, *, notes: Mapping[str, str] | None = None) -> None:
    """Write a plain PEFT adapter into a directory, with the tokenizer and the card that lay beside it.

    Args:
        adapter: what to write.
        directory: an empty directory.
        notes: further text files, {file name: content}.

    Raises:
        OSError: if the disk is full.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(adapter.tensors), directory / _WEIGHTS, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(None, f"{_WEIGHTS}: {error}") from error
    write_text(directory / _CONFIG, json.dumps(dict(adapter.config), indent=2, ensure_ascii=False))
    for beside in sorted(adapter.directory.glob("*")):
        if beside.suffix in _BESIDE and beside.name not in _NOT_BESIDE and beside.is_file():
            shutil.copyfile(beside, directory / beside.name)
    for name, text in (notes or {}).items():
        write_text(directory / name, text)


def is_adapter(path: Path) -> bool:
    """Whether a directory holds a PEFT adapter."""
    return (path / _CONFIG).is_file()
