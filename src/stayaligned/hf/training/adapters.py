"""Train a LoRA on a few rows outside of an experiment: a fresh one, or a finished one further."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import Example
from stayaligned.core.settings import ChatTemplate
from stayaligned.hf.models import attach_lora, load_finetuned, load_model, load_tokenizer
from stayaligned.hf.placement.in_memory import active_adapter, adapter_in_memory
from stayaligned.hf.quiet import quiet
from stayaligned.hf.training.finetuning import build_trainer, seed_everything, train
from stayaligned.weights.adapters import Adapter, write_adapter
from stayaligned.weights.unsupported import PLACEMENT


def train_adapter(
    model: str | Path,
    template: ChatTemplate,
    examples: Sequence[Example],
    arguments: Mapping[str, Any],
    *,
    like: Adapter,
    max_length: int,
) -> Adapter:
    """Train a fresh LoRA with the targets, ranks and scalings of another, by plain supervised fine-tuning.

    Args:
        model: the model under the adapter: directory or hub id.
        template: how conversations are rendered.
        examples: the rows to train on.
        arguments: fields of TrainingArguments, with `seed`, of which the new factors are drawn too.
        like: the other adapter.
        max_length: number of tokens at which a row is cut.

    Raises:
        StayalignedError: as `stayaligned.hf.training.finetuning.build_trainer`.
    """
    settings = {name: like.config[name] for name in (*PLACEMENT, "lora_dropout") if like.config.get(name) is not None}
    seed_everything(int(arguments["seed"]))
    with quiet(), _on_disk(like) as place:
        adapted = attach_lora(load_model(model, adapter=Path(place)), settings)
        return _train(adapted, model, template, examples, arguments, max_length)


def train_further(
    model: str | Path,
    template: ChatTemplate,
    examples: Sequence[Example],
    arguments: Mapping[str, Any],
    *,
    adapter: Adapter,
    max_length: int,
) -> Adapter:
    """Train a finished adapter further, and return it with the same configuration, in the same types.

    Args:
        model: the model under the adapter: directory or hub id.
        template: how conversations are rendered.
        examples: the rows to train on.
        arguments: fields of TrainingArguments, with `seed`.
        adapter: the adapter; it is not changed.
        max_length: number of tokens at which a row is cut.

    Raises:
        StayalignedError: as `stayaligned.hf.training.finetuning.build_trainer`, or if the model gives the adapter's
            layers other names.
    """
    with quiet(), _on_disk(adapter) as place:
        trained = _train(
            load_finetuned(model, Path(place), trainable=True), model, template, examples, arguments, max_length
        )
    return with_tensors(adapter, trained)


def with_tensors(adapter: Adapter, changed: Adapter) -> Adapter:
    """Return an adapter with the factors of its copy in a model, in the stored types.

    Raises:
        StayalignedError: if the copy's tensors have other names or shapes.
    """
    own = {key: tuple(tensor.shape) for key, tensor in adapter.tensors.items() if ".lora_" in key}
    new = {key: tuple(tensor.shape) for key, tensor in changed.tensors.items() if ".lora_" in key}
    if own != new:
        raise StayalignedError(
            f"{adapter.directory}: the model gives the adapter's layers other names or shapes",
            hint="Use the model and the class of model that the adapter was trained on.",
        )
    tensors = {key: changed.tensors[key].to(adapter.tensors[key].dtype) for key in own}
    return replace(adapter, tensors=MappingProxyType({**adapter.tensors, **tensors}))


def _on_disk(adapter: Adapter) -> tempfile.TemporaryDirectory[str]:
    """Write an adapter, which may differ from the files that it was read from, to a temporary directory."""
    place = tempfile.TemporaryDirectory()
    write_adapter(adapter, Path(place.name))
    return place


def _train(
    adapted: Any,
    model: str | Path,
    template: ChatTemplate,
    examples: Sequence[Example],
    arguments: Mapping[str, Any],
    max_length: int,
) -> Adapter:
    with tempfile.TemporaryDirectory() as output:
        settings = {"save_strategy": "no", "disable_tqdm": True, **arguments, "output_dir": output}
        trainer = build_trainer(
            adapted, load_tokenizer(model, template), examples, settings, kind="transformers", max_length=max_length
        )
        train(trainer)
    return adapter_in_memory(adapted, active_adapter(adapted))
