"""`stayaligned project`: patch finished fine-tunes with Safe LoRA, the complement or a control."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stayaligned.cli.console import err, out, plain_table
from stayaligned.cli.options import field_options
from stayaligned.core.errors import StayalignedError
from stayaligned.core.text import visible
from stayaligned.defenses import DEFENSES, Execution, ModelPair
from stayaligned.defenses._projection import ProjectionDefense
from stayaligned.defenses.complement import Complement
from stayaligned.defenses.safe_lora import ControlName, OperatorName, SafeLora, projection_spec

if TYPE_CHECKING:
    from stayaligned.core.records import LayerReport
    from stayaligned.defenses import PatchDefense


@field_options(ProjectionDefense, "threshold", "lowest", optional=True)
@field_options(SafeLora, "rank", "energy", optional=True)
@field_options(Complement, "side", optional=True)
def project(
    finetuned: Annotated[
        list[Path],
        typer.Argument(help="PEFT LoRA adapters of one model, or one fully fine-tuned checkpoint; only read."),
    ],
    *,
    aligned: Annotated[
        str | None, typer.Option(help="Aligned model, which was fine-tuned: directory or hub id.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="Base model, its unaligned ancestor: directory or hub id.")] = None,
    subspace: Annotated[
        Path | None, typer.Option(help="Subspace file (`subspace build`), instead of the two models.")
    ] = None,
    out_dir: Annotated[
        Path,
        typer.Option(
            "--out", help="New directory; must not exist. With several adapters, it gets a subdirectory for each."
        ),
    ],
    all_layers: Annotated[bool, typer.Option("--all", help="Change every layer.")] = False,
    scan: Annotated[
        bool, typer.Option("--scan", help="Write no patch; report what each threshold would change.")
    ] = False,
    operator: Annotated[OperatorName, typer.Option(help="The operator; scaled_gram is the paper's C.")] = "scaled_gram",
    control: Annotated[
        ControlName | None, typer.Option(help="Apply this control to the selected layers instead.")
    ] = None,
    device: Annotated[str, typer.Option(help="Where products are computed: cpu, or cuda for a GPU.")] = "cpu",
    **settings: Any,
) -> None:
    """Patch finished fine-tunes with Safe LoRA.

    Works layer by layer, without loading a model.
    """
    from stayaligned.experiments.config.validation import parse_component
    from stayaligned.weights.deltas import require_device

    if (settings["threshold"] is not None) + (settings["lowest"] is not None) + all_layers + scan != 1:
        raise StayalignedError(
            "the layers to change are not specified",
            hint="Give exactly one of --threshold T, --lowest K and --all, or --scan to see what they would change.",
        )
    if (subspace is None) == (base is None) or (subspace is None and aligned is None):
        raise StayalignedError(
            "the source of the alignment direction is not specified",
            hint="Give --aligned and --base, or --subspace (with --aligned for a fully fine-tuned checkpoint).",
        )
    spec = projection_spec(operator, settings, control)
    patch: PatchDefense = parse_component(DEFENSES, spec, "project")
    require_device(device)
    models = ModelPair(aligned=aligned, base=base, subspace=subspace)
    if scan:
        _scan(finetuned, out_dir, patch, models, device)
    else:
        _patch(finetuned, out_dir, patch, models, device)


def _patch(finetuned: list[Path], out_dir: Path, patch: PatchDefense, models: ModelPair, device: str) -> None:
    from stayaligned.cli.progress import weights_bar
    from stayaligned.defenses.patching.directories import (
        PROJECTION_FILE,
        patch_directories,
        patch_directory,
        read_projection,
    )

    command = ["stayaligned", *sys.argv[1:]]
    with weights_bar() as progress:
        if len(finetuned) == 1:
            outs = [out_dir]
            reports = [
                patch_directory(finetuned[0], out_dir, patch, models, command=command, device=device, progress=progress)
            ]
        else:
            outs = [out_dir / name for name in _output_names(finetuned)]
            how = Execution(device, progress)
            reports = patch_directories(finetuned, outs, patch, models, command=command, how=how)
    if len(reports) == 1:
        _print_layers(reports[0])
    else:
        _print_adapters(outs, reports)
    for each in outs:
        for note in read_projection(each / PROJECTION_FILE).notes:
            err.print(f"note: {note}", soft_wrap=True)
        out.print(f"wrote  {each}  (projection.json reports every layer)", soft_wrap=True)


def _scan(finetuned: list[Path], out_dir: Path, patch: PatchDefense, models: ModelPair, device: str) -> None:
    from stayaligned.cli.progress import weights_bar
    from stayaligned.core.files import new_directory, refuse_existing
    from stayaligned.defenses.patching.scan import scan_adapters
    from stayaligned.report.scan import threshold_outcomes, write_scan

    outs = [out_dir] if len(finetuned) == 1 else [out_dir / name for name in _output_names(finetuned)]
    for place in outs:
        refuse_existing(place)
    with weights_bar() as progress:
        found = scan_adapters(finetuned, patch, models, Execution(device, progress))
    for place, layers in zip(outs, found, strict=True):
        with new_directory(place) as temporary:
            names = [path.name for path in write_scan(layers, temporary, patch.identity())]
        if len(outs) == 1:
            _print_layers(layers)
        _print_outcomes(threshold_outcomes(layers))
        for name in names:
            out.print(f"wrote  {place / name}", soft_wrap=True)


def _output_names(adapters: Sequence[Path]) -> list[str]:
    """Return a unique directory name for each adapter: its own name, with its parents' names where needed."""
    resolved = [path.resolve() for path in adapters]
    for depth in range(1, max(len(path.parts) for path in resolved)):
        names = ["-".join(path.parts[-depth:]) for path in resolved]
        if len(set(names)) == len(names):
            return names
    raise StayalignedError("an adapter is given twice", hint="Give each adapter once.")


def _print_layers(layers: Sequence[LayerReport]) -> None:
    bounded = any(layer.truncation_error is not None for layer in layers)
    table = plain_table(
        "layer", "similarity", "kept norm", "changed", *(["error of C"] if bounded else []), numbers=True
    )
    for layer in layers:
        cells = [f"{layer.similarity:.4f}", f"{layer.shrinkage:.4f}", "yes" if layer.selected else ""]
        error = [] if layer.truncation_error is None else [f"{layer.truncation_error:.1e}"]
        table.add_row(visible(layer.module), *cells, *error)
    out.print(table)
    out.print(f"{sum(layer.selected for layer in layers)} of {len(layers)} layers changed")
    if all(layer.update_norm == 0 for layer in layers):
        err.print(
            "note: the update is zero in every layer (B = 0): the adapter was not trained, or its update was removed"
        )


def _print_adapters(outs: Sequence[Path], reports: Sequence[Sequence[LayerReport]]) -> None:
    from stayaligned.report.scan import kept_norm

    table = plain_table("adapter", "layers", "changed", "lowest similarity", "kept norm", numbers=True)
    for place, layers in zip(outs, reports, strict=True):
        table.add_row(
            visible(place.name),
            str(len(layers)),
            str(sum(layer.selected for layer in layers)),
            f"{min(layer.similarity for layer in layers):.4f}",
            f"{kept_norm(layers):.4f}",
        )
    out.print(table)


def _print_outcomes(rows: Sequence[Any]) -> None:
    table = plain_table("threshold", "layers changed", "kept norm", numbers=True)
    for row in rows:
        table.add_row(f"{row.threshold:.2f}", f"{row.changed} of {row.layers}", f"{row.kept_norm:.4f}")
    out.print(table)
