"""`stayaligned project`: patch finished fine-tunes with Safe LoRA, the complement, a control, or any other patch."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from stayaligned.cli.console import note, out, plain_table, wrote
from stayaligned.cli.modes import answer
from stayaligned.cli.options import Plugins, component_specs, field_options, load_plugins
from stayaligned.core.errors import StayalignedError
from stayaligned.core.text import visible
from stayaligned.defenses import DEFENSES, Execution, ModelPair
from stayaligned.defenses._projection import ProjectionDefense
from stayaligned.defenses.complement import Complement
from stayaligned.defenses.safe_lora import ControlName, OperatorName, SafeLora, projection_spec

if TYPE_CHECKING:
    from stayaligned.core.records import Example, LayerReport
    from stayaligned.defenses import PatchDefense
    from stayaligned.report.scan import ThresholdOutcome


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
    defense: Annotated[
        str | None,
        typer.Option(help="Another patch, with its settings: a name, or '{name: csulora, rank: 16}'."),
    ] = None,
    alignment_data: Annotated[
        str | None, typer.Option(help="Requests with safe completions, for a --defense that needs them.")
    ] = None,
    allow_mismatch: Annotated[
        bool, typer.Option("--allow-mismatch", help="Patch although the models don't seem to belong together.")
    ] = False,
    allow_undecided: Annotated[
        bool, typer.Option("--allow-undecided", help="Patch although --subspace leaves the selection open.")
    ] = False,
    device: Annotated[str, typer.Option(help="Where products are computed: cpu, or cuda for a GPU.")] = "cpu",
    plugin: Plugins = None,
    **settings: Any,
) -> None:
    """Patch finished fine-tunes with Safe LoRA.

    Any other patch by --defense. Works layer by layer, without loading a model; a patch that trains loads the aligned
    model.
    """
    from stayaligned.core.files import refuse_existing, refuse_inside
    from stayaligned.experiments.config.validation import parse_component
    from stayaligned.weights.deltas import require_device

    load_plugins(plugin)
    selection = {"all": all_layers, "scan": scan}
    if defense is not None:
        of_operator = {"operator": operator != "scaled_gram", "control": control, **selection, **settings}
        patch = _named_patch(defense, of_operator)
    else:
        _require_one_selection({**selection, "threshold": settings["threshold"], "lowest": settings["lowest"]})
        patch = parse_component(DEFENSES, projection_spec(operator, settings, control), "project")
    _require_sources(patch, aligned, base, subspace, alignment_data)
    outs = [out_dir] if len(finetuned) == 1 else [out_dir / name for name in _output_names(finetuned)]
    for each in outs:  # before torch is imported, which takes seconds
        refuse_existing(each)
        refuse_inside(each, *finetuned, aligned, base)
    require_device(device)
    sources = [Path(_resolve(str(path)) or path) for path in finetuned]
    models = ModelPair(
        aligned=_resolve(aligned),
        base=_resolve(base),
        subspace=subspace,
        allow_mismatch=allow_mismatch,
        allow_undecided=allow_undecided,
        alignment_examples=_read_rows(alignment_data),
    )
    (_scan if scan else _patch)(sources, outs, patch, models, device)


def _require_one_selection(given: Mapping[str, Any]) -> None:
    """Raise unless exactly one option says which layers to change."""
    if sum(value is not None and value is not False for value in given.values()) != 1:
        raise StayalignedError(
            "the layers to change are not specified",
            hint="Give exactly one of --threshold T, --lowest K and --all, or --scan to see what they would change.",
        )


def _named_patch(text: str, of_operator: Mapping[str, Any]) -> PatchDefense:
    """Parse --defense, which excludes the options of Safe LoRA's operators."""
    from stayaligned.defenses import PatchDefense
    from stayaligned.experiments.config.validation import parse_component, resolve_references

    more = [f"--{name}" for name, value in of_operator.items() if value is not None and value is not False]
    if more:
        raise StayalignedError(
            f"{', '.join(more)}: not with --defense, which has its own settings",
            hint="Write them into it: --defense '{name: csulora, rank: 16}'.",
        )
    (spec,) = component_specs([text], "--defense")
    found = parse_component(DEFENSES, {"name": spec} if isinstance(spec, str) else spec, "--defense")
    if not isinstance(found, PatchDefense):
        patches = [name for name in DEFENSES.names() if issubclass(DEFENSES.get(name), PatchDefense)]
        raise StayalignedError(
            f"--defense {found.name}: it acts during fine-tuning, not on a finished one",
            hint=f"Name a patch: {', '.join(patches)}.",
        )
    return resolve_references(found, 0)


def _require_sources(
    patch: PatchDefense, aligned: str | None, base: str | None, subspace: Path | None, alignment_data: str | None
) -> None:
    """Raise unless the options name what the patch reads."""
    if patch.needs_alignment_data and alignment_data is None:
        raise StayalignedError(
            f"--defense {patch.name} needs alignment data",
            hint="Give --alignment-data, a JSONL file of requests and safe completions.",
        )
    if patch.needs_base and ((subspace is None) == (base is None) or (subspace is None and aligned is None)):
        raise StayalignedError(
            "the source of the alignment direction is not specified",
            hint="Give --aligned and --base, or --subspace (with --aligned for a fully fine-tuned checkpoint).",
        )
    if not patch.needs_base and aligned is None:
        raise StayalignedError(f"--defense {patch.name} needs the aligned model", hint="Give --aligned.")


def _read_rows(source: str | None) -> Sequence[Example]:
    from stayaligned.data.sources import read_examples

    return () if source is None else read_examples(_resolve(source) or source, origin="alignment")


def _resolve(ref: str | None) -> str | None:
    """Replace a `testbed:` reference by its directory, as experiments do (of seed 0)."""
    if ref is None or not ref.startswith("testbed:"):
        return ref
    from stayaligned.cli.progress import status
    from stayaligned.experiments.config.validation import resolve_references

    with status("testbed") as report:
        return resolve_references(ref, 0, report)


def _patch(finetuned: list[Path], outs: list[Path], patch: PatchDefense, models: ModelPair, device: str) -> None:
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
            reports = [
                patch_directory(finetuned[0], outs[0], patch, models, command=command, device=device, progress=progress)
            ]
        else:
            how = Execution(device, progress)
            reports = patch_directories(finetuned, outs, patch, models, command=command, how=how)
    if len(reports) == 1:
        _print_layers(reports[0], "changed")
    else:
        _print_adapters(outs, reports)
    answer(patched=[{"directory": each, "layers": layers} for each, layers in zip(outs, reports, strict=True)])
    for each in outs:
        for text in read_projection(each / PROJECTION_FILE).notes:
            note(text if len(outs) == 1 else f"{each.name}: {text}")
        wrote(each, "projection.json reports every layer")


def _scan(finetuned: list[Path], outs: list[Path], patch: PatchDefense, models: ModelPair, device: str) -> None:
    from stayaligned.cli.progress import weights_bar
    from stayaligned.core.extras import EXTRAS, require_packages
    from stayaligned.core.files import new_directory
    from stayaligned.defenses.patching.scan import scan_adapters
    from stayaligned.report.scan import threshold_outcomes, write_scan

    require_packages({"the report of --scan": EXTRAS["report"]})
    with weights_bar() as progress:
        found = scan_adapters(finetuned, patch, models, Execution(device, progress))
    scans: list[dict[str, Any]] = []
    for place, patched in zip(outs, found, strict=True):
        with new_directory(place) as temporary:
            written = write_scan(patched.layers, temporary, patch.identity(), patched.notes)
            names = [path.name for path in written]
        if len(outs) == 1:
            _print_layers(patched.layers, "would change")
        else:
            out.print(visible(place.name), soft_wrap=True)
        outcomes = threshold_outcomes(patched.layers)
        scans.append({"directory": place, "layers": patched.layers, "thresholds": [row._asdict() for row in outcomes]})
        _print_outcomes(outcomes)
        for text in patched.notes:
            note(text)
        for name in names:
            wrote(place / name)
    answer(scans=scans)


def _output_names(adapters: Sequence[Path]) -> list[str]:
    """Return a unique directory name for each adapter: its own name, with its parents' names where needed."""
    resolved = [path.resolve() for path in adapters]
    for depth in range(1, max(len(path.parts) for path in resolved)):
        names = ["-".join(path.parts[-depth:]) for path in resolved]
        if len(set(names)) == len(names):
            return names
    raise StayalignedError("an adapter is given twice", hint="Give each adapter once.")


def _print_layers(layers: Sequence[LayerReport], verb: Literal["changed", "would change"]) -> None:
    """Print a row for each layer and what they keep together."""
    from stayaligned.defenses.patching.summary import describe_kept, summarize

    bounded = any(layer.truncation_error is not None for layer in layers)
    table = plain_table("layer", "similarity", "kept", verb, *(["error of C"] if bounded else []), numbers=True)
    for layer in layers:
        cells = [f"{layer.similarity:.4f}", f"{layer.shrinkage:.4f}", "yes" if layer.selected else ""]
        if layer.skipped is not None:
            cells = ["", f"{layer.shrinkage:.4f}", _SKIPPED[layer.skipped]]
        elif layer.undecided:
            cells[-1] = "yes, undecided" if layer.selected else "undecided"
        error = [] if layer.truncation_error is None else [f"{layer.truncation_error:.1e}"]
        table.add_row(visible(layer.module), *cells, *error)
    out.print(table)
    found = summarize(layers)
    changed = f"{found.changed} of {found.layers} layers {verb}"
    out.print(changed if verb == "changed" else f"at most {found.changed} of {found.layers} layers would change")
    if found.changed and verb == "changed":
        out.print(describe_kept(found), soft_wrap=True)


_SKIPPED = {
    "zero_update": "zero update",
    "rounded_update": "rounding",
    "no_direction": "V is zero",
    "rounded_direction": "V is rounding",
}


def _print_adapters(outs: Sequence[Path], reports: Sequence[Sequence[LayerReport]]) -> None:
    from stayaligned.defenses.patching.summary import percent, summarize

    table = plain_table("adapter", "layers", "changed", "lowest", "median kept", "norm kept", numbers=True)
    for place, layers in zip(outs, reports, strict=True):
        found = summarize(layers)
        lowest = min((layer.similarity for layer in layers if layer.skipped is None), default=0.0)
        table.add_row(
            visible(place.name),
            str(found.layers),
            str(found.changed),
            f"{lowest:.4f}",
            "" if found.kept_median is None else percent(found.kept_median),
            percent(found.kept_norm),
        )
    out.print(table)
    out.print("lowest: the lowest similarity; kept: the norm of the update after / before the patch", soft_wrap=True)


def _print_outcomes(rows: Sequence[ThresholdOutcome]) -> None:
    from stayaligned.defenses.patching.summary import percent

    open_ones = any(row.undecided for row in rows)
    table = plain_table(
        "threshold", "would change", "median kept", "norm kept", *(["undecided"] if open_ones else []), numbers=True
    )
    for row in rows:
        table.add_row(
            f"{row.threshold:.2f}",
            f"{row.changed} of {row.layers}",
            "" if row.kept_median is None else percent(row.kept_median),
            percent(row.kept_norm),
            *([str(row.undecided)] if open_ones else []),
        )
    out.print(table)
