"""Patch an adapter on disk: a new directory beside it, with the record of what was done and to what."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from stayaligned.adapters import read_adapter, refuse_existing, write_adapter
from stayaligned.checkpoints import checkpoint_directory, read_json_object
from stayaligned.defenses import ModelPair, PatchDefense
from stayaligned.errors import StayalignedError
from stayaligned.files import fingerprint
from stayaligned.records import LayerReport
from stayaligned.results import versions

PROJECTION_FILE = "projection.json"
"""The record's file name in the new adapter's directory."""
_FORMAT = 1


def patch_directory(
    adapter: str | Path,
    out: str | Path,
    patch: PatchDefense,
    models: ModelPair,
    *,
    command: Sequence[str] = (),
    progress: Callable[[str], None] | None = None,
) -> list[LayerReport]:
    """Write a patched copy of an adapter, and `projection.json`: the defense, every layer's report, hashes, versions.

    The copy loads wherever the original did: same rank, same configuration. The input is only read.

    Args:
        adapter: the directory of a PEFT adapter.
        out: a directory that does not exist yet; it appears whole or not at all.
        patch: the defense.
        models: the aligned model and its base.
        command: the command line to put on record.
        progress: called with a sentence before each step that takes time.

    Returns:
        A report for every LoRA layer, changed or not.

    Raises:
        StayalignedError: if `out` exists, or the inputs are damaged or don't fit together.
    """
    say = progress or (lambda _: None)
    adapter, out = Path(adapter), Path(out)
    refuse_existing(out)
    say(f"Reading {adapter}")
    original = read_adapter(adapter)
    say(f"Comparing {models.aligned} with {models.base or 'nothing'}, layer by layer")
    patched = patch.patch(original, models)
    say("Hashing the inputs")
    record: dict[str, Any] = {
        "format": _FORMAT,
        "defense": patch.identity(),
        "paper": patch.paper,
        "command": list(command),
        "inputs": {"adapter": _input(adapter), "aligned": _input(models.aligned), "base": _input(models.base)},
        "versions": versions(),
        "layers": [report.model_dump(mode="json") for report in patched.layers],
    }
    say(f"Writing {out}")
    write_adapter(
        patched.adapter, out, notes={PROJECTION_FILE: json.dumps(record, indent=2, ensure_ascii=False) + "\n"}
    )
    return list(patched.layers)


def read_projection(path: Path) -> list[LayerReport]:
    """The layer reports of a `projection.json`.

    Raises:
        StayalignedError: if the file is missing or `patch_directory` did not write it.
    """
    hint = "Patch the adapter again; the file is written beside it."
    try:
        return [LayerReport.model_validate(row) for row in read_json_object(path, hint=hint)["layers"]]
    except (KeyError, TypeError, ValidationError) as error:
        raise StayalignedError(f"{path} is no record of a patch: {error}", hint=hint) from None


def _input(ref: str | Path | None) -> dict[str, str] | None:
    return None if ref is None else {"ref": str(ref), "sha256": fingerprint(checkpoint_directory(ref))}
