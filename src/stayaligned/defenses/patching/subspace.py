"""Build a subspace file from the aligned model and its base model."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stayaligned.core.errors import StayalignedError
from stayaligned.core.files import new_file, refuse_existing, refuse_inside
from stayaligned.core.provenance import versions
from stayaligned.defenses.patching.ancestry import check_ancestry, check_records
from stayaligned.weights.checkpoints import Checkpoint, open_checkpoint, weights_fingerprint
from stayaligned.weights.deltas import BytesDone, Delta, WeightOverlap, equal_weights_error, pair_weights, stream
from stayaligned.weights.subspace_file import ModelIdentity, ModuleHeader, SubspaceHeader, encode_header, view_bytes

if TYPE_CHECKING:
    from stayaligned.algorithms.alignment_delta import TruncatedDelta
    from stayaligned.hf.placement.layers import PlacedWeight


def build_subspace(
    aligned: str | Path,
    base: str | Path,
    out: Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    device: str = "cpu",
    progress: Callable[[BytesDone], None] | None = None,
    allow_mismatch: bool = False,
) -> SubspaceHeader:
    """Write the subspace file of a pair of models; it appears complete or not at all.

    It holds every linear weight that a LoRA on "all-linear" or on experts changes. Triplets are written as soon as
    they are computed, so memory does not grow with the number of modules. Equal input gives equal bytes.

    Args:
        aligned: the aligned model: directory or hub id.
        base: its unaligned ancestor.
        out: a file that does not exist yet.
        rank: triplets per module. Exactly one of `rank` and `energy` is given.
        energy: the share of ‖V‖² that the triplets hold, above 0 and up to 1.
        device: where V is computed and decomposed, "cpu" or "cuda".
        progress: called with the bytes read so far.
        allow_mismatch: whether to write the file although the models have no common ancestor.

    Raises:
        StayalignedError: if `out` exists or can't be written, or the models are damaged, equal, unrelated or don't fit
            together.
    """
    from stayaligned.algorithms.alignment_delta import leading_triplets, measure_tail, no_triplets
    from stayaligned.hf.placement.layers import linear_weights

    in_range = (rank is None or rank >= 1) and (energy is None or 0 < energy <= 1)
    if (rank is None) == (energy is None) or not in_range:
        raise StayalignedError(
            f"rank={rank} and energy={energy}: expected exactly one, a rank of at least 1 or an energy in (0, 1]",
            hint="Give one of them; rank=64 suits most uses.",
        )
    refuse_existing(out)
    pair = open_checkpoint(aligned), open_checkpoint(base)
    refuse_inside(out, *(checkpoint.directory for checkpoint in pair))
    weights = {weight.name: weight for weight in linear_weights(*pair)}
    items = pair_weights(*pair, {name: (weight.stored[0], weight.stored[1]) for name, weight in weights.items()})
    identities = [_identify(ref, checkpoint) for ref, checkpoint in zip((aligned, base), pair, strict=True)]
    if identities[0].sha256 == identities[1].sha256:
        raise equal_weights_error(*pair)
    header = SubspaceHeader(
        aligned=identities[0],
        base=identities[1],
        rank=rank,
        energy=energy,
        modules={name: _largest_entry(weight, pair[0], rank) for name, weight in weights.items()},
        versions=versions(),
    )

    def decompose(name: str, differences: list[Delta]) -> tuple[TruncatedDelta, float]:
        (found,) = differences
        overlaps.update({} if found.overlap is None else {name: found.overlap})
        v = found.value.T if weights[name].transposed else found.value
        triplets = no_triplets(v) if found.rounding else measure_tail(v, leading_triplets(v, rank=rank, energy=energy))
        return triplets.to("cpu"), found.norm

    check_records(*pair, allowed=allow_mismatch)
    modules: dict[str, ModuleHeader] = {}
    overlaps: dict[str, WeightOverlap] = {}
    with new_file(out) as temporary, temporary.open("wb") as file:
        reserved = file.seek(len(encode_header(header)))
        for name, (found, norm) in stream(items, decompose, device=device, progress=progress):
            for part in (found.left, found.values, found.right):
                file.write(view_bytes(part))
            modules[name] = header.modules[name].model_copy(update=_measured(found, norm))
        if not any(module.rank for module in modules.values()):
            raise equal_weights_error(*pair)
        entries = {name: math.prod(module.shape) for name, module in modules.items()}
        check_ancestry(*pair, overlaps, entries=entries, allowed=allow_mismatch)
        header = header.model_copy(update={"modules": modules})
        file.seek(0)
        file.write(encode_header(header, reserved))
    return header


def _largest_entry(weight: PlacedWeight, checkpoint: Checkpoint, rank: int | None) -> ModuleHeader:
    """Return the longest header entry that the module can get, to reserve room for the header."""
    rows, columns = checkpoint.matrix_shape(weight.stored[0])
    shape = (columns, rows) if weight.transposed else (rows, columns)
    longest = sys.float_info.min  # prints with 17 digits and a three-digit exponent
    stored = min(shape) if rank is None else min(rank, *shape)
    return ModuleHeader(
        shape=shape,
        transposed=weight.transposed,
        norm=longest,
        rank=stored,
        captured_energy=longest,
        tail=longest,
        cross=longest,
        rounding=False,
    )


def _measured(found: TruncatedDelta, norm: float) -> dict[str, Any]:
    """Return the fields of a module's header that are known once its V is decomposed."""
    fields = {"rank": len(found.values), "norm": norm, "captured_energy": found.captured_energy}
    fields |= {"rounding": True} if found.rounding else {}
    tail = found.tail
    return fields | ({"tail": _round_up(tail.largest), "cross": _round_up(tail.cross)} if tail is not None else {})


def _round_up(bound: float) -> float:
    """Round a bound up to seven digits."""
    return float(f"{bound * (1 + 1e-6):.7g}")


def _identify(ref: str | Path, checkpoint: Checkpoint) -> ModelIdentity:
    own = checkpoint.config().get("_name_or_path")
    name = (own if isinstance(own, str) else "") if Path(ref).is_dir() else str(ref).partition("@")[0]
    return ModelIdentity(ref=str(ref), name=name, sha256=weights_fingerprint(checkpoint))
