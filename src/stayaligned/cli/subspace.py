"""`stayaligned subspace`: build and show the files that `stayaligned project` uses instead of a pair of models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stayaligned.cli.console import note, out, plain_table, wrote
from stayaligned.cli.modes import answer
from stayaligned.core.errors import StayalignedError
from stayaligned.core.text import visible

_ENOUGH = 0.999
"""Share of V's energy from which a file decides nearly every selection."""

subspace_app = typer.Typer(
    help="Build and show subspace files.\n\nWith a subspace file, `project` needs neither of the two models.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)


@subspace_app.command()
def build(
    *,
    aligned: Annotated[str, typer.Option(help="Aligned model: directory or hub id.")],
    base: Annotated[str, typer.Option(help="Base model, its unaligned ancestor: directory or hub id.")],
    out_file: Annotated[Path, typer.Option("--out", help="File to write; must not exist.")],
    rank: Annotated[int | None, typer.Option(min=1, help="Number of V's directions per module.")] = None,
    energy: Annotated[
        float | None, typer.Option(help="Instead of --rank: share of ‖V‖² that the directions hold.")
    ] = None,
    allow_mismatch: Annotated[
        bool, typer.Option("--allow-mismatch", help="Build although the models don't seem to belong together.")
    ] = False,
    device: Annotated[str, typer.Option(help="Where products are computed: cpu, or cuda for a GPU.")] = "cpu",
) -> None:
    """Write a subspace file for a pair of models.

    The file holds the leading directions of V = W_aligned - W_base, module by module.
    """
    from stayaligned.cli.progress import weights_bar
    from stayaligned.core.files import refuse_existing, refuse_inside
    from stayaligned.defenses.patching.subspace import build_subspace
    from stayaligned.weights.deltas import require_device

    refuse_existing(out_file)
    refuse_inside(out_file, aligned, base)
    if (rank is None) == (energy is None):
        raise StayalignedError("the number of directions is not specified", hint="Give one of --rank K and --energy E.")
    require_device(device)
    with weights_bar() as progress:
        header = build_subspace(
            *(aligned, base, out_file),
            rank=rank,
            energy=energy,
            device=device,
            progress=progress,
            allow_mismatch=allow_mismatch,
        )
    answer(header=header)
    stored = [module.rank for module in header.modules.values()]
    captured = [module.captured_energy for module in header.modules.values() if module.rank]
    out.print(
        f"{len(stored)} modules, {min(stored)} to {max(stored)} directions each, "
        f"{min(captured):.1%} to {max(captured):.1%} of V's energy"
    )
    if min(captured) < _ENOUGH:
        note(
            "with the paper's C, a threshold or --lowest is refused where the missing part of V could select "
            "other layers; a larger --rank or --energy narrows that"
        )
    wrote(out_file, f"{out_file.stat().st_size / 1e6:.1f} MB")


@subspace_app.command()
def show(file: Annotated[Path, typer.Argument(help="A file that `subspace build` wrote.", show_default=False)]) -> None:
    """Show the models and modules of a subspace file.

    For each module: its rank, and how much of V it captures.
    """
    from stayaligned.weights.subspace_file import SubspaceFile

    header = SubspaceFile(file).header
    answer(header=header)
    for role, model in (("aligned", header.aligned), ("base", header.base)):
        name = f"  ({model.name})" if model.name not in ("", model.ref) else ""
        out.print(f"{role:<8} {model.ref}{name}  sha256 {model.sha256}", soft_wrap=True)
    requested = f"rank {header.rank}" if header.rank is not None else f"energy {header.energy:g}"
    out.print(f"built with {requested}; written by stayaligned {header.versions.get('stayaligned', 'unknown')}\n")
    table = plain_table("module", "out × in", "k", "captured energy", "‖V‖", numbers=True)
    for name, module in header.modules.items():
        shape = "×".join(map(str, module.shape))
        table.add_row(visible(name), shape, str(module.rank), f"{module.captured_energy:.4f}", f"{module.norm:.4g}")
    out.print(table)
