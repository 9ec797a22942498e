"""Patch adapters and fine-tuned models on disk: write new directories with a record of what was done."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from stayaligned.core.errors import StayalignedError
from stayaligned.core.files import (
    copyable_files,
    fingerprint,
    new_directory,
    refuse_existing,
    refuse_inside,
    write_text,
)
from stayaligned.core.provenance import versions
from stayaligned.core.records import Example, LayerReport, Record
from stayaligned.defenses import Execution, ModelPair, PatchDefense
from stayaligned.defenses.patching.full_weights import is_copied
from stayaligned.defenses.patching.summary import notes_on, summarize
from stayaligned.weights.adapters import is_adapter, notes_on_copies, read_adapter, write_adapter
from stayaligned.weights.checkpoints import (
    check_format,
    open_checkpoint,
    read_json_object,
    tensors_fingerprint,
    weights_fingerprint,
)
from stayaligned.weights.safetensors import SafetensorsFile

if TYPE_CHECKING:
    from stayaligned.weights.deltas import BytesDone

PROJECTION_FILE = "projection.json"
"""File name of the record in the new directory."""
_FORMAT = 2


class ProjectionRecord(Record):
    """The content of `projection.json`: what was patched, how, and what was done to each layer."""

    format: int = _FORMAT
    """Number of the file format."""
    defense: dict[str, Any]
    """The identity of the patch."""
    paper: str
    """Where the patch was published; empty if nowhere."""
    command: tuple[str, ...]
    """The command line."""
    inputs: dict[str, dict[str, str]]
    """{role: {"ref": the path or hub id as given, the kind of hash: the hash}}."""
    notes: tuple[str, ...]
    """What a reader of the record must know."""
    versions: dict[str, str]
    """Versions of the packages that were used."""
    changed: int | None = None
    """Number of changed layers; None in records of earlier versions, as the next three."""
    candidates: int | None = None
    """Number of layers that a projection can change: not those with a zero update or V = 0."""
    kept_median: float | None = None
    """Median over the changed layers of the norm of the update after / before the patch."""
    kept_norm: float | None = None
    """Norm of the whole update after / before the patch."""
    layers: tuple[LayerReport, ...]
    """A report for every layer, changed or not."""


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
    """Write a patched copy of an adapter or of a fully fine-tuned model, with its record `projection.json`.

    The copy loads like the original: an adapter keeps its rank, configuration and file layout, a model its shards;
    unchanged tensors are copied byte for byte. The input is only read.

    Args:
        finetuned: the directory of a PEFT adapter, or of a fine-tuned checkpoint.
        out: a directory that does not exist yet; it appears complete or not at all.
        patch: the defense.
        models: the aligned model and its base, or a subspace file.
        command: the command line to store in the record.
        device: where products are computed, "cpu" or "cuda".
        progress: called with the bytes read so far.

    Returns:
        A report for every layer, changed or not.

    Raises:
        StayalignedError: if `out` exists, or the inputs are damaged or don't fit together.
    """
    finetuned, out = Path(finetuned), Path(out)
    refuse_existing(out)
    if not finetuned.is_dir():
        raise StayalignedError(f"{finetuned}: no such directory", hint="Give an adapter, or a fine-tuned checkpoint.")
    refuse_inside(out, finetuned, models.aligned, models.base)
    how = Execution(device, progress)
    if is_adapter(finetuned) or not (finetuned / "config.json").is_file():
        return patch_directories([finetuned], [out], patch, models, command=command, how=how)[0]
    notes: list[str] = []
    with _Hashes() as hashes, new_directory(out) as temporary:
        hashes.start(finetuned=finetuned, **_inputs(models), **_named_by(patch))
        hashes.start_rows(patch, models)
        how = replace(how, note=notes.append)
        layers = patch.patch_model(open_checkpoint(finetuned), temporary, models, how)
        notes.extend([*note_on_earlier_patch(finetuned), *copyable_files(finetuned, is_copied)[1]])
        write_text(temporary / PROJECTION_FILE, _encode_record(patch, command, hashes.all(), layers, notes))
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
    """Patch several adapters of one model as `patch_directory` does, reading the models' weights only once.

    Args:
        adapters: directories of PEFT adapters.
        outs: one directory for each adapter; none exists yet. Either all of them appear or none.
        patch: the defense.
        models: the aligned model and its base, or a subspace file.
        command: the command line to store in the records.
        how: device and progress.

    Returns:
        The reports of each adapter.

    Raises:
        StayalignedError: as `patch_directory`.
    """
    for out in outs:
        refuse_existing(out)
        refuse_inside(out, *adapters, models.aligned, models.base)
    with _Hashes() as hashes, ExitStack() as places:
        originals = [read_adapter(path) for path in adapters]
        hashes.start(**_inputs(models), **_named_by(patch), **{f"adapter {i}": path for i, path in enumerate(adapters)})
        hashes.start_rows(patch, models)
        notes: list[str] = []
        patched = patch.patch_all(originals, models, replace(how or Execution(), note=notes.append))
        found = hashes.all()
        written = [places.enter_context(new_directory(out)) for out in outs]
        for index, (directory, one) in enumerate(zip(written, patched, strict=True)):
            inputs = {name: value for name, value in found.items() if not name.startswith("adapter ")}
            inputs = {"adapter": found[f"adapter {index}"], **inputs}
            path = adapters[index]
            caveats = [*one.notes, *notes, *note_on_earlier_patch(path), *notes_on_copies(path)]
            record = _encode_record(patch, command, inputs, one.layers, caveats)
            write_adapter(one.adapter, directory, notes={PROJECTION_FILE: record})
    return [list(one.layers) for one in patched]


def note_on_earlier_patch(finetuned: Path) -> list[str]:
    """Return a note if an adapter or a model is the result of a patch: another one changes what that one left."""
    path = finetuned / PROJECTION_FILE
    if not path.is_file():
        return []
    try:
        name = read_projection(path).defense.get("name")
    except StayalignedError:
        return [f"{path} shows that {finetuned} was patched before; this patch is applied to what that one left"]
    return [f"{finetuned} was patched before, by {name}; this patch is applied to what that one left"]


def read_projection(path: Path) -> ProjectionRecord:
    """Read a `projection.json` that `patch_directory` wrote.

    Raises:
        StayalignedError: if the file is missing, damaged, or of another format.
    """
    hint = "Patch again: the file is written beside the patched weights."
    content = read_json_object(path, hint=hint)
    check_format(path, content, _FORMAT, hint=f"Another version of stayaligned wrote it. {hint}")
    try:
        return ProjectionRecord.model_validate(content)
    except ValidationError as error:
        raise StayalignedError(f"{path} is not a record of a patch: {error}", hint=hint) from None


def _encode_record(
    patch: PatchDefense,
    command: Sequence[str],
    inputs: Mapping[str, dict[str, str]],
    layers: Sequence[LayerReport],
    notes: Sequence[str],
) -> str:
    summary = summarize(layers)
    record = ProjectionRecord(
        defense=patch.identity(),
        paper=patch.paper,
        command=tuple(command),
        inputs=dict(inputs),
        notes=tuple(dict.fromkeys([*notes, *notes_on(patch, layers)])),
        changed=summary.changed,
        candidates=summary.candidates,
        kept_median=summary.kept_median,
        kept_norm=summary.kept_norm,
        versions=versions(),
        layers=tuple(layers),
    )
    return json.dumps(record.model_dump(mode="json"), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _inputs(models: ModelPair) -> dict[str, str | Path]:
    named = {"aligned": models.aligned, "base": models.base, "subspace": models.subspace}
    return {name: ref for name, ref in named.items() if ref is not None}


def _named_by(patch: PatchDefense) -> dict[str, str | Path]:
    """Return the files and directories that the settings of a patch name."""
    named = {"second_adapter": "adapter", "harmful_data": "harmful_data"}
    of = getattr(patch, "like", patch)
    found = {role: getattr(of, setting, None) for role, setting in named.items()}
    return {role: ref for role, ref in found.items() if isinstance(ref, str) and Path(ref).exists()}


class _Hashes:
    """Hashes the inputs in its own thread while the weights are processed."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="hashes")
        self._running: dict[str, tuple[str, Future[dict[str, str]]]] = {}

    def __enter__(self) -> _Hashes:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def start(self, **inputs: str | Path) -> None:
        """Start hashing checkpoints (`aligned`, `base`, `finetuned`: directories or hub ids), adapters and files."""
        for name, ref in inputs.items():
            self._running[name] = str(ref), self._pool.submit(_hash_input, name, ref)

    def start_rows(self, patch: PatchDefense, models: ModelPair) -> None:
        """Start hashing the alignment rows, if the patch uses them."""
        if patch.needs_alignment_data:
            rows = models.alignment_examples
            self._running["alignment_data"] = f"{len(rows)} rows", self._pool.submit(_hash_rows, rows)

    def all(self) -> dict[str, dict[str, str]]:
        """Wait for all hashes and return {name: the path or hub id, and its hash}."""
        return {name: {"ref": ref, **future.result()} for name, (ref, future) in self._running.items()}


def _hash_rows(rows: Sequence[Example]) -> dict[str, str]:
    text = "\n".join(row.model_dump_json() for row in rows)
    return {"rows_sha256": hashlib.sha256(text.encode()).hexdigest()}


def _hash_input(name: str, ref: str | Path) -> dict[str, str]:
    if name in ("aligned", "base", "finetuned"):
        return {"weights_sha256": weights_fingerprint(open_checkpoint(ref))}
    if name == "subspace":
        file = SafetensorsFile(Path(ref), hint="Build the subspace file again.")
        return {"tensors_sha256": tensors_fingerprint(dict.fromkeys(sorted(file.entries), file))}
    return {"sha256": fingerprint(Path(ref))}
