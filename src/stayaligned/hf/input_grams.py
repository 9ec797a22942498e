"""Gram matrices of what a model's linear modules receive on a few rows."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import Example
from stayaligned.core.settings import ChatTemplate
from stayaligned.hf.features import encode_examples
from stayaligned.hf.models import load_finetuned, load_tokenizer
from stayaligned.hf.quiet import quiet


class InputGrams:
    """A loaded model that computes Σ x xᵀ over the tokens of rows, for the inputs x of some of its linear modules.

    Args:
        model: the model: directory or hub id.
        template: how conversations are rendered.
        examples: the rows, each with its answer.
        max_length: number of tokens at which a row is cut.
    """

    def __init__(
        self, model: str | Path, template: ChatTemplate, examples: Sequence[Example], *, max_length: int
    ) -> None:
        self._ref = model
        with quiet():
            self._model: Any = load_finetuned(model, None).eval()
            rows = encode_examples(load_tokenizer(model, template), examples, max_length)
        self._ids = [torch.tensor([row["input_ids"]], device=self._model.device) for row in rows]

    def compute(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Return {module: Σ x xᵀ, (in, in), fp32 on the CPU}, by one pass over the rows.

        Raises:
            StayalignedError: if the model has no such linear module, as for an expert of a stack.
        """
        found: dict[str, Tensor] = {}

        def add(name: str, _module: Any, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).float()
            found[name] = found[name] + x.T @ x if name in found else x.T @ x

        modules = dict(self._model.named_modules())
        missing = [name for name in names if name not in modules]
        if missing:
            raise StayalignedError(
                f"{self._ref}: {missing[0]} is no module of its own, so that its inputs are not known",
                hint="The method needs linear modules; stacks of experts are not supported.",
            )
        hooks = [modules[name].register_forward_pre_hook(partial(add, name)) for name in names]
        try:
            with torch.no_grad():
                for ids in self._ids:
                    self._model(input_ids=ids)
        finally:
            for hook in hooks:
                hook.remove()
        return {name: gram.cpu() for name, gram in found.items()}
