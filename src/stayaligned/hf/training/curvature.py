"""The curvature of a model's training loss, measured on rows and in the weights that are trained."""

from __future__ import annotations

import math
import os
import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stayaligned.core.errors import StayalignedError
from stayaligned.core.progress import Progress, silent
from stayaligned.core.settings import CurvatureSettings
from stayaligned.data.sampling import sample
from stayaligned.data.sources import read_examples
from stayaligned.hf.features import IGNORED, PaddingCollator, encode_examples, refuse_unknown_tokens
from stayaligned.hf.models import attach_lora, load_finetuned, load_tokenizer
from stayaligned.hf.quiet import bars_off

if TYPE_CHECKING:
    from torch import Tensor

    from stayaligned.algorithms.curvature import Spectrum


@dataclass(frozen=True, slots=True)
class TrainedWeights:
    """The weights in which the curvature is measured: an adapter's, a fresh LoRA's, or all weights of a model."""

    model: str
    """The aligned model: a checkpoint directory or a hub id."""
    adapter: Path | None = None
    """A LoRA adapter of the model, whose factors are trained."""
    lora: Mapping[str, Any] | None = None
    """Fields of PEFT's LoraConfig, for a fresh adapter that is trained."""


@dataclass(frozen=True, slots=True)
class LossCurvature:
    """The curvature of one source's loss: the mean cross-entropy of the completions' tokens, as in training."""

    source: str
    rows: int
    tokens: int
    loss: float
    weights: int
    """Number of trained weights."""
    spectrum: Spectrum


def loss_curvatures(
    trained: TrainedWeights,
    sources: Sequence[str],
    settings: CurvatureSettings,
    progress: Progress = silent,
) -> list[LossCurvature]:
    """Measure the ends of the spectrum of the loss's Hessian for each source, in fp32 and without dropout.

    Args:
        trained: the weights by which the loss is differentiated.
        sources: rows as `stayaligned.data.sources` reads them; for Lisa, the alignment data and the user's data.
        settings: the number of rows and of products.
        progress: called with a description of the work and the share that is done.

    Raises:
        StayalignedError: if rows, model or adapter are invalid, the loss is not finite or can't be differentiated
            twice, or memory is too small.
    """
    import torch

    if trained.adapter is not None and trained.lora is not None:
        raise StayalignedError(
            "both an adapter and the settings of a fresh LoRA are given", hint="Give one of the two."
        )
    examples = [read_examples(source, origin="task") for source in sources]
    rng = [random.Random(settings.seed) for _ in sources]  # noqa: S311 (no secret)
    chosen = [sample(e, min(settings.rows, len(e)), r) for e, r in zip(examples, rng, strict=True)]
    tokenizer = load_tokenizer(trained.model)
    encoded = [encode_examples(tokenizer, rows, settings.max_length) for rows in chosen]
    model = _trainable(trained, settings.seed)
    refuse_unknown_tokens(tokenizer, model, [row["input_ids"] for rows in encoded for row in rows])
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    _require_memory(sum(weight.numel() for weight in weights), settings)
    collate = PaddingCollator.of(tokenizer, model)
    found: list[LossCurvature] = []
    for source, rows in zip(sources, encoded, strict=True):
        loss = _Loss(model, collate, rows, settings.batch_size)
        try:
            found.append(_curvature(source, loss, weights, settings, progress))
        except torch.OutOfMemoryError as error:
            raise StayalignedError(
                f"{trained.model}: out of memory: {' '.join(str(error).split())[:200]}",
                hint="Lower the batch size or the maximum length, or train fewer weights.",
            ) from None
        except RuntimeError as error:
            if "is not implemented" not in str(error):
                raise
            raise StayalignedError(
                f"{trained.model}: its loss can't be differentiated twice: {' '.join(str(error).split())[:200]}",
                hint="One of the model's operations has no second derivative in torch on this device.",
            ) from None
    return found


class _Loss:
    """Mean cross-entropy over the label tokens of fixed rows, in parts of `batch_size` rows that sum to it."""

    def __init__(self, model: Any, collate: PaddingCollator, rows: list[dict[str, list[int]]], batch_size: int) -> None:
        self._model = model
        # Sorted by length for less padding. The sum does not depend on the order.
        ordered = sorted(rows, key=lambda row: len(row["input_ids"]))
        self._batches = [collate(ordered[at : at + batch_size]) for at in range(0, len(ordered), batch_size)]
        self.rows = len(rows)
        self.tokens = sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in self._batches)

    def parts(self) -> list[Callable[[], Tensor]]:
        """Return one function per batch, which computes its share of the loss."""
        return [lambda batch=batch: self._share(batch) for batch in self._batches]

    def _share(self, batch: Mapping[str, Tensor]) -> Tensor:
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.nn.functional import cross_entropy

        moved = {name: value.to(self._model.device) for name, value in batch.items()}
        labels = moved.pop("labels")
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
            logits = self._model(**moved, use_cache=False).logits
        return (
            cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="sum") / self.tokens
        )


def _curvature(
    source: str,
    loss: _Loss,
    weights: Sequence[Tensor],
    settings: CurvatureSettings,
    progress: Progress,
) -> LossCurvature:
    import torch

    from stayaligned.algorithms.curvature import hessian_product, random_start, spectrum_ends

    with torch.no_grad():
        value = sum(part().item() for part in loss.parts())
    if not math.isfinite(value):
        raise StayalignedError(
            f"{source}: the model's loss on these rows is {value}",
            hint="Check that the weights are finite and the adapter belongs to the model.",
        )
    done = 0

    def product(vector: Tensor) -> Tensor:
        nonlocal done
        image = hessian_product(loss.parts(), weights, vector)
        done += 1
        progress(f"{source}: products with the Hessian", done / settings.iterations)
        return image

    start = random_start(weights, settings.seed)
    spectrum = spectrum_ends(product, start, settings.iterations, keep_basis=not settings.low_memory)
    return LossCurvature(source, loss.rows, loss.tokens, value, start.numel(), spectrum)


def _trainable(trained: TrainedWeights, seed: int) -> Any:
    """Load the model in fp32 and evaluation mode, with gradients required of the trained weights only."""
    import torch

    with bars_off(True), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # PEFT's warning about an attribute of transformers, which users can't act on.
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        model: Any = load_finetuned(trained.model, trained.adapter, dtype=torch.float32, trainable=True)
        if trained.lora is not None:
            torch.manual_seed(seed)
            model = attach_lora(model, trained.lora)
    return model.eval()


def _require_memory(weights: int, settings: CurvatureSettings) -> None:
    """Check that main memory is large enough for the Lanczos basis, before the process is killed for it."""
    needed = 0 if settings.low_memory else settings.iterations * weights * 4
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > available:
        raise StayalignedError(
            f"{settings.iterations} Lanczos vectors of {weights:,} weights need {needed / 1e9:.0f} GB of memory; "
            f"this machine has {available / 1e9:.0f} GB",
            hint="Use low memory (no basis), fewer iterations, or a LoRA instead of all weights.",
        )
