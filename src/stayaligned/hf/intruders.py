"""PEFT's reduction of intruder dimensions, for an adapter on disk or in memory."""

from __future__ import annotations

import tempfile
from importlib.metadata import version
from pathlib import Path

import torch

from stayaligned.core.errors import StayalignedError
from stayaligned.hf.models import load_finetuned
from stayaligned.hf.placement.in_memory import active_adapter, adapter_in_memory
from stayaligned.hf.quiet import quiet
from stayaligned.hf.training.adapters import with_tensors
from stayaligned.weights.adapters import Adapter, write_adapter

_NEW = "intruders_reduced"


def reduce_intruders(model: str | Path, adapter: Adapter, *, top_k: int, threshold: float, share: float) -> Adapter:
    """Return the adapter after `peft.tuners.lora.intruders.reduce_intruder_dimension`, in the same types.

    Args:
        model: the model under the adapter: directory or hub id. It is loaded in fp32.
        adapter: the adapter; it is not changed.
        top_k: PEFT's `top_k`.
        threshold: PEFT's `threshold_epsilon`.
        share: PEFT's `mitigation_lambda`.

    Raises:
        StayalignedError: if the installed PEFT lacks the function.
    """
    try:
        from peft.tuners.lora.intruders import reduce_intruder_dimension
    except ImportError:
        raise StayalignedError(
            f"PEFT {version('peft')} has no reduce_intruder_dimension", hint="Install a newer PEFT."
        ) from None
    with tempfile.TemporaryDirectory() as directory, quiet(), torch.no_grad():
        write_adapter(adapter, Path(directory))
        adapted = load_finetuned(model, Path(directory), dtype=torch.float32)
        reduce_intruder_dimension(
            adapted,
            old_adapter_name=active_adapter(adapted),  # pyright: ignore[reportArgumentType]
            new_adapter_name=_NEW,
            top_k=top_k,
            threshold_epsilon=threshold,
            mitigation_lambda=share,
            logging_sink=None,
        )
        return with_tensors(adapter, adapter_in_memory(adapted, _NEW))  # pyright: ignore[reportArgumentType]
