"""SafeMERGE: merge a safety adapter into the layers whose update points away from the alignment direction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import Field, model_validator

from stayaligned.core.errors import StayalignedError
from stayaligned.defenses import Execution, ModelPair, PatchedAdapter
from stayaligned.defenses._training_patch import TrainingPatch
from stayaligned.defenses.patching.adapters import patch_adapters
from stayaligned.defenses.patching.layers import LayerPatch, ProjectedLayer
from stayaligned.defenses.safe_lora import SafeLora

if TYPE_CHECKING:
    from stayaligned.algorithms.safe_lora import LoraFactors
    from stayaligned.weights.adapters import Adapter


class SafeMerge(TrainingPatch):
    """Merge a safety adapter into an update where it points away from the alignment.

    D ← (1 - w) D + w D_s in the layers with cos(D, C D) < τ, with Safe LoRA's C (arXiv 2503.17239) and the update D_s
    of an adapter that was trained on alignment rows: the one of `adapter`, or one that is trained here on
    `alignment_data`, with the adapter's own targets, ranks and scalings.

    The sum is stored exactly, by factors of the ranks' sum. The paper's code mixes A with A_s and B with B_s by √w
    (PEFT's `linear`), whose product also has the terms B A_s and B_s A; its variant with DARE drops entries of the
    factors. τ and w are the code's; how its safety adapters were trained is not known here, so `epochs`,
    `learning_rate` and `batch_size` are ours. Layers with a zero update or V = 0 are left unchanged.

    Cost: Safe LoRA's, and the training of the safety adapter. Compare with `shrink` with `factor: 0.8` and the same
    threshold (the same layers without D_s), with `all_layers` (merging everywhere), with `random_change`, and with an
    adapter of benign rows.

    Example:
        >>> SafeMerge(lowest=4).threshold is None
        True
    """

    name: ClassVar[str] = "safe_merge"
    paper: ClassVar[str] = "https://arxiv.org/abs/2503.17239"
    needs_base: ClassVar[bool] = True
    raises_rank: ClassVar[bool] = True

    adapter: str | None = None
    """Directory of the safety adapter; if unset, it is trained on the alignment rows."""
    weight: float = Field(default=0.2, ge=0, le=1)
    """Weight w of the safety adapter in the selected layers."""
    threshold: float | None = Field(default=0.35, allow_inf_nan=False)
    """Merge the layers with similarity strictly below this. Excludes `lowest` and `all_layers`."""
    lowest: int | None = Field(default=None, ge=0)
    """Merge exactly this many layers, the least similar ones."""
    all_layers: bool = False
    """Merge every layer."""

    @property
    def needs_alignment_data(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the safety adapter is trained here."""
        return self.adapter is None

    @model_validator(mode="before")
    @classmethod
    def _replace_default_threshold(cls, data: Any) -> Any:
        other = isinstance(data, dict) and (data.get("lowest") is not None or data.get("all_layers"))
        return {"threshold": None, **data} if other else data

    @model_validator(mode="after")
    def _check_selection(self) -> Self:
        self._selector()
        return self

    def _selector(self) -> SafeLora:
        return SafeLora(threshold=self.threshold, lowest=self.lowest, all_layers=self.all_layers)

    def patch(self, adapter: Adapter, models: ModelPair) -> PatchedAdapter:
        """Merge the safety adapter into the selected layers."""
        return self.patch_all([adapter], models, Execution())[0]

    def patch_all(self, adapters: Sequence[Adapter], models: ModelPair, how: Execution) -> list[PatchedAdapter]:
        """Merge the safety adapter into each; one that is trained here has the targets of the adapter."""
        return [self._merge(adapter, models, how) for adapter in adapters]

    def _merge(self, adapter: Adapter, models: ModelPair, how: Execution) -> PatchedAdapter:
        from stayaligned.defenses.patching.changes import place_on_aligned
        from stayaligned.defenses.patching.summary import NORM_OF_SUM

        layers, _ = place_on_aligned(adapter, models, self.name)
        models.require_base(self.name)
        found, on_safety = self.second_adapter(
            self.adapter, adapter, lambda: models.require_alignment_examples(self.name), models
        )
        lacking = [layer.name for layer in layers if layer.name not in found]
        if lacking:
            raise StayalignedError(
                f"{self.adapter}: the safety adapter has no update of {lacking[0]}, which {adapter.directory} changes",
                hint="Give a safety adapter with the same target_modules, or none, and alignment data.",
            )

        def merge(layer: ProjectedLayer) -> LayerPatch:
            from stayaligned.algorithms.safe_lora import scale_update

            own, safe = scale_update(layer.before, 1 - self.weight), found[layer.name].to(how.device)
            return LayerPatch(_join(own, safe._replace(scaling=self.weight * safe.scaling)), None)

        (patched,) = patch_adapters(self._selector(), merge, [adapter], models, how, raises_rank=True)
        return PatchedAdapter(patched.adapter, patched.layers, [*patched.notes, *on_safety, NORM_OF_SUM])


def _join(update: Any, further: LoraFactors) -> LoraFactors:
    """Return factors of the sum of two updates, with the first one's scaling."""
    import torch

    b = further.b * (further.scaling / update.scaling)
    return update._replace(a=torch.cat([update.a, further.a]), b=torch.cat([update.b, b], dim=1))
