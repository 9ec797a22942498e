"""Report every layer of an adapter as if it were changed, to show what each threshold would do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from stayaligned.core.errors import StayalignedError
from stayaligned.defenses.patching.directories import note_on_earlier_patch
from stayaligned.defenses.patching.summary import notes_on
from stayaligned.weights.adapters import read_adapter

if TYPE_CHECKING:
    from stayaligned.defenses import Execution, ModelPair, PatchDefense, PatchedAdapter


def scan_adapters(
    adapters: Sequence[Path], patch: PatchDefense, models: ModelPair, how: Execution
) -> list[PatchedAdapter]:
    """Return each adapter as if every layer were changed, in one pass; nothing is written.

    Args:
        adapters: directories of PEFT adapters of one model.
        patch: a projection of all layers, or a control for one.
        models: the aligned model and its base, or a subspace file.
        how: device and progress.

    Raises:
        StayalignedError: if `patch` leaves layers out, or the inputs don't fit together.
    """
    notes: list[str] = []
    patched = patch.patch_all([read_adapter(path) for path in adapters], models, replace(how, note=notes.append))
    if not all(layer.selected or layer.skipped for one in patched for layer in one.layers):
        raise StayalignedError(
            f"a scan needs a defense that changes every layer, but {patch.name} leaves layers out",
            hint="Set all_layers in the defense.",
        )
    found: list[PatchedAdapter] = []
    for path, one in zip(adapters, patched, strict=True):
        caveats = [*one.notes, *notes, *note_on_earlier_patch(path), *notes_on(patch, one.layers, would=True)]
        found.append(replace(one, notes=tuple(dict.fromkeys(caveats))))
    return found
