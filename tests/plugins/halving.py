"""A third party's patch: every update is halved."""

from typing import TYPE_CHECKING, ClassVar

from stayaligned.defenses import ModelPair, PatchDefense, PatchedAdapter
from stayaligned.records import LayerReport

if TYPE_CHECKING:
    from stayaligned.adapters import Adapter


class Halving(PatchDefense):
    """Halves the B of every layer."""

    name: ClassVar[str] = "halving"
    needs_base: ClassVar[bool] = False

    def patch(self, adapter: "Adapter", models: ModelPair) -> PatchedAdapter:
        from stayaligned.checkpoints import open_checkpoint
        from stayaligned.hf.layers import lora_layers
        from stayaligned.projection import scaled, shrinkage, update_norm

        edits, reports = {}, []
        for layer in lora_layers(adapter, open_checkpoint(models.aligned)):
            before = adapter.factors(layer)
            edits[layer.name] = layer, scaled(before, 0.5)
            reports.append(
                LayerReport(
                    module=layer.name,
                    similarity=1.0,
                    shrinkage=shrinkage(before, scaled(before, 0.5)),
                    selected=True,
                    update_norm=update_norm(before),
                )
            )
        return PatchedAdapter(adapter.with_factors(dict(edits.values())), reports)
