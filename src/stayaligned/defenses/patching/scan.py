"""Report every layer of an adapter as if it were changed, to show what each threshold would do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stayaligned.core.errors import StayalignedError
from stayaligned.weights.adapters import read_adapter

if TYPE_CHECKING:
    from stayaligned.core.records import LayerReport
    from stayaligned.defenses import Execution, ModelPair, PatchDefense


def scan_adapters(
    adapters: Sequence[Path], patch: PatchDefense, models: ModelPair, how: Execution
) -> list[list[LayerReport]]:
    """Return the reports of each adapter's layers as if they were changed, in one pass; nothing is written.

    Args:
        adapters: directories of PEFT adapters of one model.
        patch: a projection of all layers, or a control for one.
        models: the aligned model and its base, or a subspace file.
        how: device and progress.

    Raises:
        StayalignedError: if `patch` leaves layers out, or the inputs don't fit together.
    """
    patched = patch.patch_all([read_adapter(path) for path in adapters], models, how)
    reports = [list(one.layers) for one in patched]
    if not all(layer.selected for layers in reports for layer in layers):
        raise StayalignedError(
            f"a scan needs a defense that changes every layer, but {patch.name} leaves layers out",
            hint="Set all_layers in the defense.",
        )
    return reports
