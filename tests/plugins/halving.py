"""A third party's patch, which halves every update."""

from typing import TYPE_CHECKING, ClassVar

from stayaligned import LayerReport, ModelPair, PatchDefense, PatchedAdapter

if TYPE_CHECKING:
    from stayaligned.weights.adapters import Adapter


class Halving(PatchDefense):
    """Halve the B of every layer."""

    name: ClassVar[str] = "halving"
    needs_base: ClassVar[bool] = False

    def patch(self, adapter: "Adapter", models: ModelPair) -> PatchedAdapter:
        from stayaligned.algorithms.safe_lora import compare, scale_update
        from stayaligned.hf.placement.layers import place_adapter
        from stayaligned.weights.checkpoints import open_checkpoint

        edits, reports = {}, []
        aligned = open_checkpoint(models.require_aligned(self.name))
        for layer in (placed.layer for placed in place_adapter(adapter, aligned, aligned)):
            before = adapter.factors(layer)
            similarity, shrinkage, norm = compare(before, scale_update(before, 0.5))
            edits[layer.name] = layer, scale_update(before, 0.5)
            reports.append(
                LayerReport(
                    module=layer.name,
                    similarity=similarity,
                    shrinkage=shrinkage,
                    selected=True,
                    update_norm=norm,
                )
            )
        return PatchedAdapter(adapter.with_factors(dict(edits.values())), reports)
