"""`stayaligned align`: make an aligned model from a base model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from stayaligned.cli.console import note, out, wrote
from stayaligned.cli.modes import answer
from stayaligned.cli.options import field_options
from stayaligned.core.processes import require_one_process
from stayaligned.experiments.config.alignment import Alignment, load_alignment


@field_options(Alignment, "data", "chat_template", optional=True)
def align(
    base: Annotated[
        str,
        typer.Argument(
            help="The base model: a directory or a hub id; or a YAML file with the settings.", show_default=False
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Further settings as key=value: lora.r=8 training.learning_rate=1e-4 lora=null"),
    ] = None,
    *,
    out_dir: Annotated[
        Path, typer.Option("--out", help="The new model's directory; rerun the same command to continue.")
    ],
    **settings: Any,
) -> None:
    """Make an aligned model from a base model.

    Fine-tunes on requests and safe answers, merges the LoRA, and writes a checkpoint.
    """
    from stayaligned.cli.progress import status
    from stayaligned.experiments.align import ALIGNMENT_FILE
    from stayaligned.experiments.align import align as run_alignment

    require_one_process("stayaligned align")
    given = {name: value for name, value in settings.items() if value is not None}
    alignment = load_alignment(base, given, overrides or ())
    existed = out_dir.exists()
    with status("starting") as progress:
        record = run_alignment(alignment, out_dir, progress=progress)
    losses = [row["loss"] for row in record.log if "loss" in row]
    loss = f", final loss {losses[-1]:.4g}" if losses else ""
    out.print(f"{record.rows} rows, {record.steps} steps{loss}; trained in {record.trained_in}")
    answer(record=record, existed=existed)
    for text in record.notes:
        note(text)
    wrote(out_dir, f"settings and log in {ALIGNMENT_FILE}", "found finished" if existed else "wrote ")
