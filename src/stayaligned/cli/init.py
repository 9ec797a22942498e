"""`stayaligned init`: ask five questions, and write a configuration and a file of safety data to fill in."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from stayaligned.cli.console import err, note, wrote
from stayaligned.cli.modes import answer
from stayaligned.core.errors import StayalignedError


def init(
    directory: Annotated[Path, typer.Argument(help="Where to write; files are never replaced.")] = Path(),
    *,
    model: Annotated[str | None, typer.Option(help="The aligned model: a directory or a hub id.")] = None,
    data: Annotated[
        str | None, typer.Option(help="What to fine-tune on: a file, hf://owner/name, or a task such as sst2.")
    ] = None,
    safety: Annotated[
        str | None, typer.Option(help="Requests with safe completions; `new` writes a file to fill in.")
    ] = None,
    defense: Annotated[str | None, typer.Option(help="lisa, mixing, safe_lora, complement, or sft for none.")] = None,
    judge: Annotated[str | None, typer.Option(help="The judge of the completions.")] = None,
    base_model: Annotated[
        str | None, typer.Option(help="The model's unaligned ancestor, for safe_lora and complement.")
    ] = None,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Ask nothing: use the defaults for what is missing.")
    ] = False,
) -> None:
    """Write a configuration to start from.

    Asks five questions, checks each answer at once, and writes experiment.yaml and, if wanted, safety.jsonl. Options
    answer the questions without a terminal.
    """
    from stayaligned.core.files import refuse_existing
    from stayaligned.experiments import starting

    config = directory / starting.CONFIG_FILE
    refuse_existing(config)
    asking = not yes and sys.stdin.isatty()
    judges = starting.judge_names()
    questions = [
        _Question(
            "model", model, "Which aligned model do you fine-tune (directory or hub id)?", None, starting.check_model
        ),
        _Question(
            "data", data, "What do you fine-tune it on (file, hf://owner/name or task)?", None, starting.check_data
        ),
        _Question(
            "safety", safety, "Where is your safety data (new: a file to fill in)?", starting.NEW, starting.check_safety
        ),
        _Question(
            "defense", defense, f"Which defense ({', '.join(starting.CHOICES)})?", "lisa", starting.check_defense
        ),
        _Question("judge", judge, f"Which judge ({', '.join(judges)})?", "keyword", starting.check_judge),
    ]
    found = {one.name: _get(one, asking=asking) for one in questions}
    if starting.needs_base(found["defense"]):
        question = f"{found['defense']} compares the model with its unaligned ancestor: which is it?"
        base_model = _get(_Question("base-model", base_model, question, None, starting.check_model), asking=asking)
    answers = starting.Answers(**found, base_model=base_model)
    files, notes = starting.write_start(answers, directory)
    answer(answers=answers)
    for text in notes:
        note(text)
    for file in files:
        wrote(file)
    if answers.safety == starting.NEW:
        err.print(f"fill in {files[0]}: a run refuses its placeholders")
    err.print(f"next: stayaligned doctor {config}")


class _Question(NamedTuple):
    name: str
    """Name of the option that answers it."""
    given: str | None
    text: str
    default: str | None
    check: Callable[[str], object]


def _get(question: _Question, *, asking: bool) -> str:
    """Return a checked answer: as given, as asked until it is right, or the default."""
    flag = f"--{question.name}"
    if question.given is None and asking:
        return _ask(question)
    value = question.default if question.given is None else question.given
    if value is None:
        raise StayalignedError(
            f"{flag} is missing, and there is no terminal to ask on", hint=f"Give {flag}: {question.text}"
        )
    try:
        question.check(value)
    except StayalignedError as error:
        raise StayalignedError(f"{flag}: {error.message}", hint=error.hint) from None
    return value


def _ask(question: _Question) -> str:
    def parse(value: str) -> str:
        try:
            question.check(value.strip())
        except StayalignedError as error:
            raise typer.BadParameter(str(error)) from None
        return value.strip()

    try:
        return typer.prompt(question.text, default=question.default, value_proc=parse, err=True)
    except typer.Abort:
        raise KeyboardInterrupt from None
