"""The completions of the final model: `completions.jsonl`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stayaligned.core.records import Completion, read_jsonl, write_jsonl
from stayaligned.defenses import SERVE_FILE
from stayaligned.evaluation.answers import (
    Ask,
    answer_all,
    ask_in_forms,
    ask_model,
    ask_server,
    check_adapter_is_live,
)
from stayaligned.evaluation.completions import COMPLETIONS_FILE
from stayaligned.experiments.stages.context import Context
from stayaligned.experiments.stages.data import find_forms, load_prompt_sets
from stayaligned.experiments.stages.patch import load_final_model

_log = logging.getLogger(__name__)


def generate(context: Context) -> list[Completion]:
    """Return the final model's completion of every prompt."""
    key = context.plan.generate
    # Completions are stored one by one beside the stage, so that a killed run generates only the missing ones.
    journal = context.store.scratch("generate", key, "answers")

    def fill(directory: Path) -> Mapping[str, Any]:
        settings = context.resolved.generation
        if settings.endpoint is not None:
            prompts = [example for examples in load_prompt_sets(context).values() for example in examples]
            arguments = context.resolved.chat_template.arguments
            check_adapter_is_live(settings.endpoint, prompts, arguments)
            ask = ask_in_forms(ask_server(settings, settings.endpoint, arguments), find_forms(context), tuple)
            return write(directory, ask, "server")
        with context.host_libraries():
            from stayaligned.hf.features import template_hash

            model, tokenizer = load_final_model(context)
            _warn_if_served_otherwise(context)
            serve = context.resolved.training_defense.serve
            ask = ask_in_forms(ask_model(model, tokenizer, settings), find_forms(context), serve)
            return write(directory, ask, template_hash(tokenizer))

    def write(directory: Path, ask: Ask, template: str) -> Mapping[str, Any]:
        rows = answer_all(journal, load_prompt_sets(context), ask, context.progress)
        write_jsonl(directory / COMPLETIONS_FILE, rows)
        return {"template_hash": template, "completions": len(rows)}

    stage = context.store.compute("generate", key, fill)
    journal.unlink(missing_ok=True)  # after the stage is complete
    return read_jsonl(stage / COMPLETIONS_FILE, Completion)


def _warn_if_served_otherwise(context: Context) -> None:
    """Log that a given adapter or model asks for a system prompt, with which this run does not ask it."""
    e = context.resolved
    file = Path(e.adapter or e.model) / SERVE_FILE
    if not e.trains and file.is_file():
        _log.warning(
            "%s names a system prompt with which the model must be served; its completions here are without it", file
        )
