"""lm-eval's tasks, a stage each: a new task computes only itself, and a killed run loses at most one task."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from stayaligned.core.records import HarnessValue, read_jsonl, write_jsonl
from stayaligned.core.settings import LmEval
from stayaligned.experiments.stages.context import Context
from stayaligned.experiments.stages.patch import load_final_model


def check_tasks(context: Context) -> None:
    """Load every task that is still to be run, so that a missing one is an error before hours of training.

    Raises:
        StayalignedError: as `hf.lm_eval.load_tasks`.
    """
    settings = context.resolved.lm_eval
    missing = [
        name for name, key in context.plan.lm_eval.items() if not context.store.directory("lm_eval", key).exists()
    ]
    if settings is None or not missing:
        return
    from stayaligned.hf import lm_eval

    with context.host_libraries():
        for name in missing:
            context.progress(f"lm-eval loads {name}", 0.0)
            lm_eval.load_tasks(settings, name)


def run_lm_eval(context: Context) -> list[HarnessValue]:
    """Return the values of every task; loads the final model once if any stage is missing."""
    settings = context.resolved.lm_eval
    if settings is None:
        return []
    load = functools.cache(lambda: load_final_model(context))
    rows: list[HarnessValue] = []
    for name, key in context.plan.lm_eval.items():
        fill = functools.partial(_fill, context, settings, name, load)
        rows += read_jsonl(context.store.compute("lm_eval", key, fill) / "lm_eval.jsonl", HarnessValue)
    return rows


def find_skipped_metrics(context: Context) -> Iterable[str]:
    """Yield a note on each metric that is skipped because it is not a mean of shares."""
    for name, key in context.plan.lm_eval.items():
        record = json.loads((context.store.directory("lm_eval", key) / "stage.json").read_text(encoding="utf-8"))
        for task, metrics in record["left_out"].items():
            for metric, why in metrics.items():
                yield f"lm_eval {name}: {metric} of {task} is left out: {why}"


def _fill(
    context: Context, settings: LmEval, name: str, load: Callable[[], tuple[Any, Any]], directory: Path
) -> Mapping[str, Any]:
    from stayaligned.hf import lm_eval
    from stayaligned.hf.training import finetuning

    report = functools.partial(context.progress, f"lm-eval {name}")
    report(0.0)
    with context.host_libraries():
        model, tokenizer = load()
        finetuning.seed_everything(context.experiment.seed)
        values, left_out = lm_eval.run_task(model, tokenizer, settings, name, progress=report)
    write_jsonl(directory / "lm_eval.jsonl", values)
    return {"left_out": left_out}
