"""`stayaligned evaluate`: measure a model, or a model with an adapter, without training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from stayaligned.cli.options import Judges, Out, Plugins, component_specs, field_options, load_plugins
from stayaligned.cli.output import run_and_show
from stayaligned.core.errors import StayalignedError
from stayaligned.experiments.config.experiment import Experiment

_TEXTS = {
    "adapter": "A finished PEFT adapter of the model, to evaluate with it.",
    "task": "Task that the model was made for; `finetune_accuracy` is measured on its test split.",
    "skills": "Another task that the model should still do; `skills_kept` is measured on its test split.",
    "seed": "Seed of the testbed that `testbed:` references mean.",
}
_FIELDS = ("adapter", "harmful_prompts", "benign_prompts", "task", "skills", "limit", "label", "seed")


@field_options(Experiment, *_FIELDS, texts=_TEXTS)
def evaluate(
    model: Annotated[str, typer.Argument(help="A checkpoint directory or hub id.", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="Further settings as key=value, with dots: generation.max_new_tokens=256 other_template=true"
        ),
    ] = None,
    *,
    out_dir: Out,
    judges: Judges = None,
    plugin: Plugins = None,
    **settings: Any,
) -> None:
    """Measure a finished model or adapter.

    Measures harm, over-refusal, utility and degeneration; `gate` compares two such runs. --task and --skills take a
    name, or settings in YAML: '{name: jsonl, test: rows.jsonl}'. Any other setting of an experiment may follow as
    key=value: generation.max_new_tokens=256 max_unscored=0.02
    """
    from stayaligned.experiments.config.validation import parse
    from stayaligned.experiments.config.yaml_file import apply_overrides

    load_plugins(plugin)
    settings = {name: None if value == "" else value for name, value in settings.items()}
    content: dict[str, Any] = {"model": model, "training": None, **settings}
    content["label"] = settings["label"] or Path(settings["adapter"] or model).name
    for name in ("task", "skills"):
        if settings[name]:
            (content[name],) = component_specs([settings[name]], f"--{name}")
    content["judges"] = component_specs(judges, "--judge") if judges else ["keyword"]
    apply_overrides(content, overrides or ())
    if content["training"] is not None:
        raise StayalignedError(
            "`evaluate` does not train, but `training` is set", hint="Use `stayaligned run` to fine-tune and evaluate."
        )
    run_and_show(parse(Experiment, content, "evaluate"), out_dir)
