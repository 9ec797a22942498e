"""`stayaligned align`: an aligned model from a base one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from stayaligned.cli.console import err, out


def align(
    base: Annotated[
        str,
        typer.Argument(help="The base model: directory or hub id; or a YAML file that names it.", show_default=False),
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, dotted: lora.r=8 training.learning_rate=1e-4 lora=null")
    ] = None,
    *,
    data: Annotated[str | None, typer.Option(help="Safety data: JSONL file or hf://owner/name.")] = None,
    out_dir: Annotated[
        Path, typer.Option("--out", help="The new model's directory; rerunning the same command continues.")
    ],
    chat_template: Annotated[
        str | None, typer.Option(help="A .jinja file; a base model often has no chat template.")
    ] = None,
) -> None:
    """Make an aligned model from a base one: fine-tune on safety data, merge, write a checkpoint."""
    from stayaligned.experiments.align import ALIGNMENT_FILE
    from stayaligned.experiments.align import align as make
    from stayaligned.experiments.config.alignment import load_alignment
    from stayaligned.hf.training.processes import require_one_process

    require_one_process("stayaligned align")
    given: dict[str, Any] = {"data": data, "chat_template": chat_template}
    settings = {name: value for name, value in given.items() if value is not None}
    alignment = load_alignment(base, settings, overrides or ())
    there = out_dir.exists()
    with err.status("starting", spinner_style="none") as status:
        record = make(
            alignment, out_dir, progress=lambda text, share: status.update(f"{text} {share:.0%}" if share else text)
        )
    losses = [row["loss"] for row in record.log if "loss" in row]
    loss = f", loss {losses[-1]:.4g} at the end" if losses else ""
    out.print(f"{record.rows} rows, {record.steps} steps{loss}; trained in {record.trained_in}")
    for note in record.notes:
        err.print(f"note: {note}", soft_wrap=True)
    verb = "there already " if there else "wrote  "
    out.print(f"{verb} {out_dir}  ({ALIGNMENT_FILE} says how it was made)", soft_wrap=True)
