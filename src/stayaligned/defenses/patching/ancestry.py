"""Check that models belong together: the aligned model with its base, and an adapter with the aligned model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from stayaligned.core.errors import StayalignedError
from stayaligned.core.files import fingerprint
from stayaligned.weights.adapters import Adapter
from stayaligned.weights.checkpoints import Checkpoint, weights_fingerprint
from stayaligned.weights.deltas import WeightOverlap
from stayaligned.weights.origin import is_named_model
from stayaligned.weights.unsupported import list_names

_UNRELATED = 0.25
"""Cosine of all compared weights below which two models have no common ancestor. Independent weights have 0, a
fine-tune of a large model above 0.99, and a weight with as much noise as weight 0.7."""
_UNRELATED_LAYER = 0.1
"""Cosine below which one layer of related models is another one's (a permuted or a replaced layer)."""
_FEWEST_ENTRIES = 1024
"""Entries of a weight from which `_UNRELATED_LAYER` is above the cosine of independent weights by chance."""
OVERRIDE = (
    "--allow-mismatch (allow_mismatch=True; in an experiment, allow_mismatch: true) patches all the same and notes it."
)
"""How to patch models that don't seem to belong together, for hints."""


def check_ancestry(
    aligned: Checkpoint,
    other: Checkpoint,
    overlaps: Mapping[str, WeightOverlap],
    *,
    role: str = "base",
    entries: Mapping[str, int],
    allowed: bool,
) -> str | None:
    """Raise unless the weights of two checkpoints are alike, as those of a model and its fine-tune are.

    Args:
        aligned: the aligned model.
        other: the model that must be related to it.
        overlaps: {layer: the overlap of both weights}.
        role: the other model's role, for the message.
        entries: {layer: the number of the weight's entries}.
        allowed: return the problem as a note for the record, and don't raise.

    Returns:
        None if they are alike.

    Raises:
        StayalignedError: if they have no common ancestor, or not in some layers.
    """
    total = WeightOverlap.total(overlaps.values())
    if total.first == 0 and total.second == 0:
        return None
    lone = [
        name
        for name, overlap in overlaps.items()
        if overlap.cosine < _UNRELATED_LAYER and entries[name] >= _FEWEST_ENTRIES and overlap.first and overlap.second
    ]
    pair = f"{aligned.directory} and {role} {other.directory}"
    if total.cosine < _UNRELATED:
        apart = max(0.0, total.first + total.second - 2 * total.inner)
        ratio = (apart / total.first) ** 0.5 if total.first else float("inf")
        problem = (
            f"{pair} have no common ancestor: the cosine of their weights is {total.cosine:.2f}, and their difference "
            f"is {ratio:.0%} of the aligned weights, where a fine-tune differs by a few percent"
        )
    elif lone:
        problem = (
            f"{pair} are unrelated in {len(lone)} of {len(overlaps)} layers (cosine of the weights below "
            f"{_UNRELATED_LAYER}): {list_names(lone, 5)}"
        )
    else:
        return None
    needed = "the checkpoint that was trained from" if role != "base" else "the pretrained ancestor of"
    return _raise_unless(allowed, problem, f"Give {needed} the aligned model. {OVERRIDE}")


def check_records(aligned: Checkpoint, base: Checkpoint, *, allowed: bool) -> str | None:
    """Raise if an `alignment.json` in one of the two directories names another base.

    Returns:
        A note for the record if that is allowed; None if no record contradicts.

    Raises:
        StayalignedError: if a record contradicts.
    """
    made_from = _recorded_base(aligned)
    if made_from is not None and not made_from.is_of(base):
        problem = f"{aligned.directory} was aligned from another base than {base.directory}, as its alignment.json says"
        hint = f"Give that base ({made_from.sha256[:12]}…). If {made_from.exception}: {OVERRIDE}"
        return _raise_unless(allowed, problem, hint)
    made_from = _recorded_base(base)
    if made_from is not None and made_from.is_of(aligned):
        problem = (
            f"{base.directory} was aligned from {aligned.directory}, as its alignment.json says: they look swapped"
        )
        return _raise_unless(allowed, problem, f"Swap aligned and base. {OVERRIDE}")
    return None


def check_trained_on(
    adapter: Adapter, aligned: Checkpoint, base: Checkpoint, refs: tuple[str, str], *, allowed: bool
) -> str | None:
    """Raise if an adapter is known to have been trained on another model than the aligned one.

    Compared are the model that `adapter_config.json` names (see `is_named_model`), and the hash of the aligned model in
    the `projection.json` of an adapter that was patched.

    Args:
        adapter: the adapter.
        aligned: the aligned model.
        base: its base.
        refs: both models as given.
        allowed: return the problem as a note for the record, and don't raise.

    Returns:
        A note for the record if the model could not be checked, or is another; None if it is the aligned model.

    Raises:
        StayalignedError: if it is another model.
    """
    recorded = _recorded_aligned(adapter.directory)
    if recorded is not None and recorded != weights_fingerprint(aligned):
        problem = (
            f"{adapter.directory} was patched against another aligned model than {aligned.directory}, as its "
            f"projection.json says"
        )
        return _raise_unless(allowed, problem, f"Give that model (weights_sha256 {recorded[:12]}…). {OVERRIDE}")
    named = adapter.config.get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        return "not checked whether the adapter was trained on the aligned model: the adapter names no model"
    is_aligned = is_named_model(named, refs[0], aligned.directory)
    if is_aligned:
        return None
    if is_named_model(named, refs[1], base.directory):
        return _raise_unless(allowed, *_swapped(adapter, named))
    if is_aligned is None:
        return (
            f"not checked whether the adapter was trained on the aligned model: it names {named}, whose weights can't "
            "be compared (not a local directory, or quantized)"
        )
    problem = f"{adapter.directory} was trained on {named}, not on {refs[0]}"
    return _raise_unless(
        allowed, problem, f"Give the model that the adapter was trained on as aligned, and its own base. {OVERRIDE}"
    )


def _swapped(adapter: Adapter, named: str) -> tuple[str, str]:
    """Return the problem and the hint for an adapter that names the base."""
    return (
        f"{adapter.directory} was trained on {named}, which is the base and not the aligned model: "
        "aligned and base look swapped",
        f"Set aligned to {named} and base to its unaligned ancestor. {OVERRIDE}",
    )


class _RecordedBase(NamedTuple):
    """The base that an `alignment.json` names."""

    sha256: str
    weights_only: bool
    """Whether the hash is that of the weights; older records have that of all files in the directory."""

    def is_of(self, checkpoint: Checkpoint) -> bool:
        """Return whether a checkpoint is that base."""
        return self.sha256 == (
            weights_fingerprint(checkpoint) if self.weights_only else fingerprint(checkpoint.directory)
        )

    @property
    def exception(self) -> str:
        """What changes the hash, but not the model."""
        return "it is the same model in another type" if self.weights_only else "only files beside its weights changed"


def _recorded_base(checkpoint: Checkpoint) -> _RecordedBase | None:
    """Return what an `alignment.json` says about the base; None without such a record."""
    record = _read(checkpoint.directory / "alignment.json")
    weights, inputs = record.get("base_weights"), record.get("inputs")
    if isinstance(weights, str) and weights:
        return _RecordedBase(weights, weights_only=True)
    value = inputs.get("base_model") if isinstance(inputs, dict) else None
    if isinstance(value, str) and value.startswith("sha256:"):
        return _RecordedBase(value.removeprefix("sha256:"), weights_only=False)
    return None


def _recorded_aligned(directory: Path) -> str | None:
    """Return the hash of the aligned model in an adapter's `projection.json`; None without such a record."""
    inputs = _read(directory / "projection.json").get("inputs")
    aligned = inputs.get("aligned") if isinstance(inputs, dict) else None
    value = aligned.get("weights_sha256") if isinstance(aligned, dict) else None
    return value if isinstance(value, str) else None


def _read(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; empty if there is none, or something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _raise_unless(allowed: bool, problem: str, hint: str) -> str:
    if not allowed:
        raise StayalignedError(problem, hint=hint)
    return f"{problem}; patched all the same, as asked"
