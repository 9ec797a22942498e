"""Which completions are degenerate: `degeneration.jsonl`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

from stayaligned.core.records import Completion, read_jsonl, write_jsonl
from stayaligned.evaluation.degeneration import Degenerate, check
from stayaligned.evaluation.results import Place
from stayaligned.experiments.stages.context import Context


def find_degenerate(context: Context, completions: Sequence[Completion]) -> dict[Place, bool | None]:
    """Return whether each completion is degenerate; empty if the experiment does not check."""
    settings = context.experiment.degeneration
    if settings is None:
        return {}

    def fill(directory: Path) -> None:
        nats: Sequence[float | None] = [None] * len(completions)
        if settings.perplexity is not None:
            with context.host_libraries():
                nats = _measure_nats(context, completions)
        found = [check(c, settings, each) for c, each in zip(completions, nats, strict=True)]
        write_jsonl(directory / "degeneration.jsonl", found)

    stage = context.store.compute("degeneration", context.plan.degeneration, fill)
    rows = read_jsonl(stage / "degeneration.jsonl", Degenerate)
    return {(row.prompt_set, row.id): row.found for row in rows}


def _measure_nats(context: Context, completions: Sequence[Completion]) -> list[float | None]:
    """Return the mean nats per token of each completion under the aligned model."""
    from stayaligned.hf import models
    from stayaligned.hf.generation import perplexity

    e = context.resolved
    report = functools.partial(context.progress, "perplexity")
    return perplexity.answer_nats(
        models.load_finetuned(e.model, None),
        models.load_tokenizer(e.model, e.chat_template),
        completions,
        progress=report,
    )
