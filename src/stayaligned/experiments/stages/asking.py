"""A check before training: a trigger, and what a defense serves, reach the model through its chat template."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Sequence
from typing import Any

from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import Example
from stayaligned.defenses import TrainingDefense
from stayaligned.evaluation.answers import Prompt
from stayaligned.experiments.stages.context import Context
from stayaligned.experiments.stages.data import load_prompt_sets, load_training_rows

_MOST = 32
"""Number of prompts, and of poisoned training rows, that are rendered."""


def check_prompts(context: Context) -> None:
    """Check that the model sees the attack's trigger, and what the defense adds to a prompt when it is served.

    Harmful prompts are rendered with and without them, and so are the rows that the attack added to the training data.
    A server renders with its own template, so nothing is checked for it.

    Raises:
        StayalignedError: if the chat template leaves out what was added, or changes nothing for it.
    """
    e = context.experiment
    triggered = "triggered" in e.harm_sets
    served = type(e.training_defense).serve is not TrainingDefense.serve
    done = context.store.directory("generate", context.plan.generate).exists()
    if done or e.generation.backend == "endpoint" or not (triggered or served):
        return
    prompts = _some_prompts(context)
    with context.host_libraries():
        from stayaligned.hf import models

        tokenizer = models.load_tokenizer(context.resolved.model, e.chat_template)
        serve = context.resolved.training_defense.serve
        attack = context.resolved.attack
        if served:
            check_change(tokenizer, f"what defense {e.training_defense.name!r} adds", prompts, serve)
        if triggered and attack is not None:
            name = f"the trigger of attack {attack.name!r}"
            check_change(tokenizer, name, prompts, attack.trigger, serve)
            if e.trains:
                _check_rows(tokenizer, name, load_training_rows(context))


def _some_prompts(context: Context) -> list[Prompt]:
    """Return some prompts, with harmful ones first."""
    return [row.prompt for rows in load_prompt_sets(context).values() for row in rows][:_MOST]


def check_change(
    tokenizer: Any,
    name: str,
    prompts: Sequence[Prompt],
    change: Callable[[Prompt], Prompt],
    serve: Callable[[Prompt], Prompt] = tuple,
) -> None:
    """Refuse a change of which the model sees nothing in some prompt, or of which the template leaves out a part.

    Raises:
        StayalignedError: naming the change, if its prompt has the same tokens, or only more of the unknown one.
    """
    from stayaligned.hf.features import encode_prompt

    for prompt in (prompt for prompt in prompts if change(prompt) != prompt):
        plain = encode_prompt(tokenizer, serve(prompt))
        with _naming(name):
            changed = encode_prompt(tokenizer, serve(change(prompt)))
        if changed == plain:
            raise StayalignedError(
                f"the model does not see {name}: the chat template renders the prompt {prompt[-1].content[:60]!r} "
                "alike with and without it",
                hint="Templates strip white space, and some ignore system turns: change the setting that adds it, or "
                "set another `chat_template`.",
            )
        unknown = tokenizer.unk_token_id
        if [token for token in changed if token != unknown] == [token for token in plain if token != unknown]:
            raise StayalignedError(
                f"the model does not see {name}: its tokenizer reads every word of it as the same unknown token",
                hint="Set the setting that adds it to a text of words that the tokenizer knows.",
            )


def _check_rows(tokenizer: Any, name: str, rows: Sequence[Example]) -> None:
    """Refuse poisoned training rows of which the chat template leaves out a part."""
    from stayaligned.hf.features import encode_prompt

    for row in [row for row in rows if row.origin == "harmful"][:_MOST]:
        with _naming(name):
            encode_prompt(tokenizer, row.prompt)


@contextlib.contextmanager
def _naming(name: str) -> Generator[None]:
    """Put what is rendered in front of an error of the chat template."""
    try:
        yield
    except StayalignedError as error:
        raise StayalignedError(f"{name}: {error.message}", hint=error.hint) from None
