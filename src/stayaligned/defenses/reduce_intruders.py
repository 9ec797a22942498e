"""PEFT's reduction of intruder dimensions, as a patch to compare others with."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from stayaligned.defenses import ModelPair, PatchDefense, PatchedAdapter

if TYPE_CHECKING:
    from stayaligned.weights.adapters import Adapter


class ReduceIntruders(PatchDefense):
    """Weaken the leading singular directions that fine-tuning added (PEFT).

    For each leading left singular direction of W + D that no direction of W resembles, (1 - λ) of its term u σ vᵀ is
    subtracted, and the rest of the update is cut to the adapter's rank again by an SVD (arXiv 2410.21228, against
    forgetting). `reduce_intruder_dimension` of the installed PEFT computes it; nothing is computed here. λ is what it
    calls `mitigation_lambda`: its documentation says that a larger one subtracts more, but its code multiplies the
    term by λ - 1 and so keeps λ of it.

    Not a method against harmful fine-tuning; a patch for it must do better. Cost: the model in fp32, and three full
    SVDs a layer. Compare with `shrink` with the factor that the record shows.

    Example:
        >>> ReduceIntruders(top_k=5).threshold
        0.5
    """

    name: ClassVar[str] = "reduce_intruders"
    paper: ClassVar[str] = "https://arxiv.org/abs/2410.21228"
    needs_base: ClassVar[bool] = False

    top_k: int = Field(default=10, ge=1)
    """Number of leading directions of W + D to look at."""
    threshold: float = Field(default=0.5, ge=0, le=1)
    """Cosine below which a direction resembles none of W's."""
    mitigation: float = Field(default=0.75, ge=0, allow_inf_nan=False)
    """λ, PEFT's `mitigation_lambda`."""

    def patch(self, adapter: Adapter, models: ModelPair) -> PatchedAdapter:
        """Call PEFT's function on the model with the adapter."""
        from stayaligned.defenses.patching.changes import place_on_aligned, report_changes
        from stayaligned.hf.intruders import reduce_intruders

        layers, notes = place_on_aligned(adapter, models, self.name)
        changed = reduce_intruders(
            models.require_aligned(self.name),
            adapter,
            top_k=self.top_k,
            threshold=self.threshold,
            share=self.mitigation,
        )
        return report_changes(adapter, changed, layers, notes)
