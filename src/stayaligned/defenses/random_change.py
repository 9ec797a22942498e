"""Control: a change of the same size in random directions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, PlainSerializer

from stayaligned.defenses import DEFENSES, Execution, ModelPair, PatchDefense, PatchedAdapter
from stayaligned.defenses.one_shot import OneShot

if TYPE_CHECKING:
    from torch import Generator

    from stayaligned.algorithms.safe_lora import LoraFactors
    from stayaligned.weights.adapters import Adapter


def _parse_patch(spec: object) -> PatchDefense:
    defense = DEFENSES.parse(spec)
    if not isinstance(defense, PatchDefense) or not defense.patches_adapters:
        raise ValueError(f"{defense.name!r} does not patch adapters")
    return defense


class RandomChange(PatchDefense):
    """Control: change what a patch changes by as much, in random directions.

    D ← D + R (X - D) Q with X the update that `like` leaves of D, and uniformly random rotations R and Q of each layer:
    the change has the singular values that the patch's has. Where a patch of any kind does better than this control,
    the reason is the direction of its change, not that the adapter was disturbed. Stored exactly, by factors of a
    higher rank.

    Cost: that of `like`.

    Example:
        >>> RandomChange(like={"name": "resta", "adapter": "harmful-adapter"}).needs_base
        False
    """

    name: ClassVar[str] = "random_change"
    raises_rank: ClassVar[bool] = True

    like: Annotated[PatchDefense, BeforeValidator(_parse_patch), PlainSerializer(lambda patch: patch.spec())] = Field(
        default_factory=OneShot
    )
    """The patch of adapters that this control is compared with."""
    seed: int = Field(default=0, ge=0)
    """Seed of the random rotations, combined with the layer's name."""

    @property
    def needs_base(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether `like` reads the base model."""
        return self.like.needs_base

    @property
    def needs_alignment_data(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether `like` uses alignment rows."""
        return self.like.needs_alignment_data

    def identity(self) -> dict[str, Any]:
        """Return `spec()` with the versions of both defenses."""
        return {**super().identity(), "like": self.like.identity()}

    def patch(self, adapter: Adapter, models: ModelPair) -> PatchedAdapter:
        """Apply `like`, and rotate its change."""
        return self.patch_all([adapter], models, Execution())[0]

    def patch_all(self, adapters: Sequence[Adapter], models: ModelPair, how: Execution) -> list[PatchedAdapter]:
        """Apply `like` to all, and rotate each change."""
        from stayaligned.weights.concatenation import layers_by_module

        for adapter in adapters:
            layers_by_module(adapter)  # raises before the work if nothing can be joined to it
        patched = self.like.patch_all(adapters, models, how)
        return [self._rotate(adapter, one, models) for adapter, one in zip(adapters, patched, strict=True)]

    def _rotate(self, adapter: Adapter, patched: PatchedAdapter, models: ModelPair) -> PatchedAdapter:
        from stayaligned.algorithms.alignment_delta import layer_generator
        from stayaligned.defenses.patching.changes import place_on_aligned, report_changes
        from stayaligned.weights.concatenation import concatenate, layers_by_module, module_of

        changed = {layer.module for layer in patched.layers if layer.selected}
        layers, notes = place_on_aligned(adapter, models, self.name)
        after = layers_by_module(patched.adapter)
        further: dict[str, LoraFactors] = {}
        for layer in layers:
            if layer.name in changed:
                generator = layer_generator(self.seed, layer.name)
                module = module_of(layer)
                further[module] = _random_change(
                    adapter.factors(layer), patched.adapter.factors(after[module]), generator
                )
        return report_changes(adapter, concatenate(adapter, further), layers, notes)


def _random_change(before: LoraFactors, after: LoraFactors, generator: Generator) -> LoraFactors:
    """Return factors of a matrix with the singular values of `after` - `before` and uniformly random directions."""
    import torch

    from stayaligned.algorithms.alignment_delta import random_frame
    from stayaligned.algorithms.safe_lora import LoraFactors

    b = torch.cat([after.scaling * after.b.double(), -before.scaling * before.b.double()], dim=1)
    a = torch.cat([after.a.double(), before.a.double()])
    core = torch.linalg.qr(b).R @ torch.linalg.qr(a.T).R.T
    values = torch.linalg.svdvals(core)
    values = values[values > 1e-7 * values.sum()]  # of fp32 factors, less is rounding
    left, right = (random_frame(size, len(values), generator) for size in (b.shape[0], a.shape[1]))
    root = values.sqrt()
    return LoraFactors((right * root).T.float(), (left * root).float(), 1.0)
