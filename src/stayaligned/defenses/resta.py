"""RESTA: subtract the update of an adapter that was trained on harmful rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Self

from pydantic import Field, model_validator

from stayaligned.core.errors import StayalignedError
from stayaligned.defenses import ModelPair, PatchedAdapter
from stayaligned.defenses._training_patch import TrainingPatch

if TYPE_CHECKING:
    from stayaligned.weights.adapters import Adapter


class Resta(TrainingPatch):
    """Add a safety vector: subtract the update of an adapter of harmful rows (RESTA).

    W_ft + γ (W_aligned - W_unaligned), with the aligned model fine-tuned on harmful rows as the unaligned one
    (arXiv 2402.11746). Both are fine-tuned from the aligned model, so that an adapter becomes D - γ D_h, stored
    exactly, by factors of the ranks' sum. D_h is that of `adapter`, or of one that is trained here on `harmful_data`
    with the adapter's own targets, ranks and scalings.

    Left out: DARE, which drops random entries of D as a matrix, because what is left has no low rank (PEFT's
    `dare_linear` drops entries of A and B, which is another operation); and full fine-tunes. γ = 1 is the plain sum;
    the paper's γ and its training on harmful rows are not known here.

    Cost: the training of the harmful adapter; none with `adapter`. Compare with `random_change`, and with an adapter
    of benign rows, which shows what the harm in the rows adds.

    Example:
        >>> Resta(adapter="harmful-adapter", weight=0.5).raises_rank
        True
    """

    name: ClassVar[str] = "resta"
    paper: ClassVar[str] = "https://arxiv.org/abs/2402.11746"
    raises_rank: ClassVar[bool] = True

    adapter: str | None = None
    """Directory of an adapter of the aligned model that was trained on harmful rows. Excludes `harmful_data`."""
    harmful_data: str | None = None
    """Harmful rows to train that adapter on: a file or hub id. Excludes `adapter`."""
    weight: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Weight γ of the safety vector."""

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        if (self.adapter is None) == (self.harmful_data is None):
            raise ValueError("set exactly one of `adapter` and `harmful_data`")
        return self

    def patch(self, adapter: Adapter, models: ModelPair) -> PatchedAdapter:
        """Subtract γ times the update of the harmful adapter."""
        from stayaligned.data.sources import read_examples
        from stayaligned.defenses.patching.changes import place_on_aligned, report_changes
        from stayaligned.defenses.patching.summary import NORM_OF_SUM
        from stayaligned.weights.concatenation import concatenate, module_of

        layers, notes = place_on_aligned(adapter, models, self.name)
        harmful, on_harmful = self.second_adapter(
            self.adapter, adapter, lambda: read_examples(str(self.harmful_data), origin="harmful"), models
        )
        modules = {layer.name: module_of(layer) for layer in layers}
        more = sorted(harmful.keys() - modules.keys())
        if more:
            raise StayalignedError(
                f"{self.adapter}: the harmful adapter changes {more[0]}, which {adapter.directory} does not",
                hint="Give a harmful adapter with the same target_modules, or `harmful_data`.",
            )
        further = {
            modules[name]: value._replace(scaling=-self.weight * value.scaling) for name, value in harmful.items()
        }
        return report_changes(adapter, concatenate(adapter, further), layers, [*notes, *on_harmful, NORM_OF_SUM])
