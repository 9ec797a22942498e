"""Patches of the fine-tuned adapter or model, and the final weights that they lead to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stayaligned.core.errors import StayalignedError
from stayaligned.defenses import ModelPair, PatchDefense
from stayaligned.defenses.patching.directories import (
    PROJECTION_FILE,
    ProjectionRecord,
    patch_directory,
    read_projection,
)
from stayaligned.evaluation.results import PatchRecord
from stayaligned.experiments.stages.context import Context
from stayaligned.experiments.stages.data import load_alignment_rows
from stayaligned.experiments.stages.train import train


def make_weights(context: Context) -> Path | None:
    """Return the adapter or model that is evaluated: trained or given, then patched; None for the model as it is."""
    e, product = context.resolved, context.plan.product
    trained = train(context)
    weights = None if trained is None else trained / product
    if e.adapter is not None:
        weights = Path(e.adapter)
    for patch, key in zip(e.patches, context.plan.patches, strict=True):
        if weights is None:
            raise StayalignedError(
                f"patch {patch.name!r}: no adapter or fine-tuned model to patch",
                hint="Set `training:` or name an `adapter:`.",
            )
        weights = _patch(context, patch, key, weights)
    return weights


def _patch(context: Context, patch: PatchDefense, key: str, source: Path) -> Path:
    product = context.plan.product
    e = context.resolved
    pair = ModelPair(
        aligned=e.model,
        base=e.base_model,
        allow_mismatch=e.allow_mismatch,
        alignment_examples=load_alignment_rows(context) if patch.needs_alignment_data else (),
        chat_template=e.chat_template,
    )

    def fill(directory: Path) -> None:
        context.progress(f"patch {patch.name}", 0.0)
        with context.host_libraries():
            patch_directory(source, directory / product, patch, pair)

    return context.store.compute("patch", key, fill) / product


def read_patches(context: Context) -> tuple[PatchRecord, ...]:
    """Return what each patch did to every layer: the one that the given weights had already, and the run's own."""
    return (
        *_read_given(context)[0],
        *(
            PatchRecord(patch=patch.name, settings=patch.spec(), layers=record.layers)
            for patch, record in zip(context.experiment.patches, _read_records(context), strict=True)
        ),
    )


def read_patch_notes(context: Context) -> Iterator[str]:
    """Yield the notes in the records of the patches, each with the patch's name."""
    yield from _read_given(context)[1]
    for patch, record in zip(context.experiment.patches, _read_records(context), strict=True):
        for note in record.notes:
            yield f"{patch.name}: {note}"


def _read_given(context: Context) -> tuple[tuple[PatchRecord, ...], tuple[str, ...]]:
    """Return the patch that the given adapter or model had already, as its `projection.json` says, and its notes."""
    e = context.resolved
    path = Path(e.adapter or e.model) / PROJECTION_FILE
    if e.trains or not path.is_file():
        return (), ()
    try:
        record = read_projection(path)
    except StayalignedError as error:
        return (), (f"the weights were patched before this run, but their record can't be read: {error.message}",)
    name = str(record.defense.get("name"))
    hashes = {role: value for role, found in record.inputs.items() for kind, value in found.items() if kind != "ref"}
    given = PatchRecord(patch=name, settings=record.defense, layers=record.layers, inputs=hashes)
    return (given,), tuple(f"{name}, before this run: {note}" for note in record.notes)


def _read_records(context: Context) -> list[ProjectionRecord]:
    directories = [context.store.directory("patch", key) for key in context.plan.patches]
    return [read_projection(directory / context.plan.product / PROJECTION_FILE) for directory in directories]


def load_final_model(context: Context) -> tuple[Any, Any]:
    """Load the model that is evaluated, and its tokenizer.

    Raises:
        StayalignedError: if the weights name another chat template than the tokenizer has (unless `other_template`).
    """
    from stayaligned.hf import models, templates

    e, weights = context.resolved, make_weights(context)
    whole = weights is not None and context.plan.product == "model"
    tokenizer = models.load_tokenizer(e.model, e.chat_template)
    for place in () if e.other_template else (Path(e.model), weights):
        if place is not None:
            templates.refuse_other_template(place, tokenizer)
    model = models.load_finetuned(weights if whole and weights else e.model, None if whole else weights)
    return model, tokenizer
