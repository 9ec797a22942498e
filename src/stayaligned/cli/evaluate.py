"""`stayaligned evaluate`: measure a model, or a model with an adapter, without training anything."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from stayaligned.cli.options import Judges, Out, Overrides, Plugins, component_specs, load_plugins
from stayaligned.cli.output import run_and_show
from stayaligned.core.errors import StayalignedError


def evaluate(
    model: Annotated[str, typer.Argument(help="A checkpoint directory or hub id.", show_default=False)],
    overrides: Overrides = None,
    *,
    out_dir: Out,
    adapter: Annotated[str | None, typer.Option(help="A PEFT adapter to put on the model.")] = None,
    harmful_prompts: Annotated[str | None, typer.Option(help="Requests to refuse: harmful score.")] = None,
    benign_prompts: Annotated[str | None, typer.Option(help="Look-alikes to answer: over-refusal.")] = None,
    task: Annotated[str | None, typer.Option(help="A task's name, or its settings as YAML: accuracy.")] = None,
    skills: Annotated[str | None, typer.Option(help="What it could do before, likewise: skills kept.")] = None,
    judges: Judges = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many prompts a set.")] = None,
    label: Annotated[str, typer.Option(help="The name of the row in tables; the model's or adapter's if none.")] = "",
    seed: Annotated[int, typer.Option(min=0, help="Pairs runs of several seeds.")] = 0,
    plugin: Plugins = None,
) -> None:
    """Measure harm, over-refusal, utility and degeneration of a finished model; `gate` compares two such runs.

    Every other setting of an experiment may follow as key=value: generation.max_new_tokens=256 max_unscored=0.02
    """
    from stayaligned.experiments.config.experiment import Experiment
    from stayaligned.experiments.config.validation import parse
    from stayaligned.experiments.config.yaml_file import apply_overrides

    load_plugins(plugin)
    content: dict[str, Any] = {
        "label": label or Path(adapter or model).name,
        "model": model,
        "adapter": adapter,
        "training": None,
        "harmful_prompts": harmful_prompts,
        "benign_prompts": benign_prompts,
        "task": component_specs([task], "--task")[0] if task else None,
        "skills": component_specs([skills], "--skills")[0] if skills else None,
        "judges": component_specs(judges, "--judge") if judges else ["keyword"],
        "limit": limit,
        "seed": seed,
    }
    apply_overrides(content, overrides or ())
    if content["training"] is not None:
        raise StayalignedError("evaluate trains nothing, but `training` is set", hint="`stayaligned run` does that.")
    run_and_show(parse(Experiment, content, "evaluate"), out_dir)
