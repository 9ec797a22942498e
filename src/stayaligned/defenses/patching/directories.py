"""Patch adapters and fine-tuned models on disk: new directories beside them, with the record of what was done."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from stayaligned.core.errors import StayalignedError
from stayaligned.core.files import fingerprint, new_directory, refuse_existing, write_text
from stayaligned.core.provenance import versions
from stayaligned.core.records import LayerReport
from stayaligned.defenses import Execution, ModelPair, PatchDefense
from stayaligned.weights.adapters import is_adapter, read_adapter, write_adapter
from stayaligned.weights.checkpoints import open_checkpoint, read_json_object, tensors_fingerprint, weights_fingerprint
from stayaligned.weights.safetensors import SafetensorsFile

if TYPE_CHECKING:
    from stayaligned.weights.deltas import BytesDone

PROJECTION_FILE = "projection.json"
"""The record's file name in the new directory."""
_FORMAT = 2


def patch_directory(
    finetuned: str | Path,
    out: str | Path,
    patch: PatchDefense,
    models: ModelPair,
    *,
    command: Sequence[str] = (),
    device: str = "cpu",
    progress: Callable[[BytesDone], None] | None = None,
) -> list[LayerReport]:
    """Write a patched copy of an adapter or of a fully fine-tuned model, and the record of it, `projection.json`.

    The copy loads wherever the original did: an adapter keeps its rank, configuration and file layout, a model its
    shards; what is not changed is copied byte for byte. The input is only read.

    Args:
        finetuned: the directory of a PEFT adapter, or of a fine-tuned checkpoint.
        out: a directory that does not exist yet; it appears whole or not at all.
        patch: the defense.
        models: the aligned model and its base, or a subspace file.
        command: the command line to put on record.
        device: where the products are made, "cpu" or "cuda".
        progress: called as the weights stream past.

    Returns:
        A report for every layer, changed or not.

    Raises:
        StayalignedError: if `out` exists, or the inputs are damaged or don't fit together.
    """
    finetuned, out = Path(finetuned), Path(out)
    refuse_existing(out)
    if not finetuned.is_dir():
        raise StayalignedError(f"{finetuned}: no such directory", hint="Give an adapter, or a fine-tuned checkpoint.")
    how = Execution(device, progress)
    if is_adapter(finetuned) or not (finetuned / "config.json").is_file():
        return patch_directories([finetuned], [out], patch, models, command=command, how=how)[0]
    with _Hashes() as hashes, new_directory(out) as temporary:
        hashes.start(finetuned=finetuned, **_inputs(models))
        layers = patch.patch_model(open_checkpoint(finetuned), temporary, models, how)
        write_text(temporary / PROJECTION_FILE, _record(patch, command, hashes.all(), layers, ()))
    return layers


def patch_directories(
    adapters: Sequence[Path],
    outs: Sequence[Path],
    patch: PatchDefense,
    models: ModelPair,
    *,
    command: Sequence[str] = (),
    how: Execution | None = None,
) -> list[list[LayerReport]]:
    """`patch_directory` for several adapters of one model; the weights are read once for all of them.

    Args:
        adapters: directories of PEFT adapters.
        outs: as many directories, none of which exists. All appear when all are written, or none does.
        patch: the defense.
        models: the aligned model and its base, or a subspace file.
        command: the command line to put on record.
        how: device and progress.

    Returns:
        The reports of each adapter.

    Raises:
        StayalignedError: as `patch_directory`.
    """
    for out in outs:
        refuse_existing(out)
    with _Hashes() as hashes, ExitStack() as places:
        originals = [read_adapter(path) for path in adapters]
        hashes.start(**_inputs(models), **{f"adapter {i}": path for i, path in enumerate(adapters)})
        patched = patch.patch_all(originals, models, how or Execution())
        found = hashes.all()
        written = [places.enter_context(new_directory(out)) for out in outs]
        for index, (directory, one) in enumerate(zip(written, patched, strict=True)):
            inputs = {name: value for name, value in found.items() if not name.startswith("adapter ")}
            inputs = {"adapter": found[f"adapter {index}"], **inputs}
            record = _record(patch, command, inputs, one.layers, one.notes)
            write_adapter(one.adapter, directory, notes={PROJECTION_FILE: record})
    return [list(one.layers) for one in patched]


def read_projection(path: Path) -> list[LayerReport]:
    """The layer reports of a `projection.json`.

    Raises:
        StayalignedError: if the file is missing or `patch_directory` did not write it.
    """
    hint = "Patch it again; the file is written beside it."
    try:
        return [LayerReport.model_validate(row) for row in read_json_object(path, hint=hint)["layers"]]
    except (KeyError, TypeError, ValidationError) as error:
        raise StayalignedError(f"{path} is no record of a patch: {error}", hint=hint) from None


def _record(
    patch: PatchDefense,
    command: Sequence[str],
    inputs: Mapping[str, Any],
    layers: Sequence[LayerReport],
    notes: Sequence[str],
) -> str:
    record: dict[str, Any] = {
        "format": _FORMAT,
        "defense": patch.identity(),
        "paper": patch.paper,
        "command": list(command),
        "inputs": inputs,
        "notes": list(notes),
        "versions": versions(),
        "layers": [report.model_dump(mode="json") for report in layers],
    }
    return json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _inputs(models: ModelPair) -> dict[str, str | Path]:
    named = {"aligned": models.aligned, "base": models.base, "subspace": models.subspace}
    return {name: ref for name, ref in named.items() if ref is not None}


class _Hashes:
    """Hashes inputs in a thread of its own, while the weights stream."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="hashes")
        self._running: dict[str, tuple[str, Future[dict[str, str]]]] = {}

    def __enter__(self) -> _Hashes:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def start(self, **inputs: str | Path) -> None:
        """Begin to hash checkpoints (`aligned`, `base`, `finetuned`: directories or hub ids), adapters and files."""
        for name, ref in inputs.items():
            self._running[name] = str(ref), self._pool.submit(_hash, name, ref)

    def all(self) -> dict[str, dict[str, str]]:
        """{name: what was named, and its hash}, once all are there."""
        return {name: {"ref": ref, **future.result()} for name, (ref, future) in self._running.items()}


def _hash(name: str, ref: str | Path) -> dict[str, str]:
    if name in ("aligned", "base", "finetuned"):
        return {"weights_sha256": weights_fingerprint(open_checkpoint(ref))}
    if name == "subspace":
        file = SafetensorsFile(Path(ref), hint="Build it anew.")
        return {"tensors_sha256": tensors_fingerprint(dict.fromkeys(sorted(file.entries), file))}
    return {"sha256": fingerprint(Path(ref))}
