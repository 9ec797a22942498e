"""The contract of patches that train a little: an adapter of their own, or the finished one further."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from stayaligned.core.records import Example
from stayaligned.defenses import ModelPair, PatchDefense

if TYPE_CHECKING:
    from stayaligned.algorithms.safe_lora import LoraFactors
    from stayaligned.weights.adapters import Adapter


class TrainingPatch(PatchDefense):
    """A patch that trains a LoRA by plain supervised fine-tuning with the host's other defaults."""

    needs_base: ClassVar[bool] = False

    epochs: float = Field(default=3.0, gt=0, allow_inf_nan=False)
    """Number of epochs of the patch's own training."""
    learning_rate: float = Field(default=1e-4, gt=0, allow_inf_nan=False)
    """Learning rate of the patch's own training."""
    batch_size: int = Field(default=8, ge=1)
    """Batch size of the patch's own training."""
    max_length: int = Field(default=1024, ge=1)
    """Number of tokens at which a row is cut in the patch's own training."""
    seed: int = Field(default=0, ge=0)
    """Seed of the patch's own training."""

    def second_adapter(
        self, path: str | None, adapter: Adapter, rows: Callable[[], Sequence[Example]], models: ModelPair
    ) -> tuple[dict[str, LoraFactors], list[str]]:
        """Return {layer: update} of a second adapter of the aligned model, and notes on it for the record.

        Args:
            path: its directory; if None, a fresh adapter with the targets, ranks and scalings of the first is trained.
            adapter: the first adapter.
            rows: returns the rows to train on.
            models: the aligned model.

        Raises:
            StayalignedError: if either adapter can't be joined with another, or a host can't train on the rows.
        """
        from stayaligned.defenses.patching.changes import place_on_aligned
        from stayaligned.weights.adapters import read_adapter
        from stayaligned.weights.concatenation import layers_by_module

        layers_by_module(adapter)  # raises before the training
        model = models.require_aligned(self.name)
        if path is not None:
            other = read_adapter(Path(path))
            layers_by_module(other)
        else:
            from stayaligned.hf.training.adapters import train_adapter

            settings, length = self._arguments(), self.max_length
            other = train_adapter(model, models.chat_template, rows(), settings, like=adapter, max_length=length)
        layers, notes = place_on_aligned(other, models, self.name, whole="left out of the sum")
        named = [f"the second adapter {path}: {note}" for note in notes if path is not None]
        return {layer.name: other.factors(layer) for layer in layers}, named

    def train_further(self, adapter: Adapter, rows: Sequence[Example], models: ModelPair) -> Adapter:
        """Train the adapter further on the rows.

        Raises:
            StayalignedError: if a host can't train on them.
        """
        from stayaligned.hf.training.adapters import train_further

        model = models.require_aligned(self.name)
        settings = self._arguments()
        return train_further(model, models.chat_template, rows, settings, adapter=adapter, max_length=self.max_length)

    def _arguments(self) -> dict[str, Any]:
        return {
            "num_train_epochs": self.epochs,
            "learning_rate": self.learning_rate,
            "per_device_train_batch_size": self.batch_size,
            "seed": self.seed,
        }
