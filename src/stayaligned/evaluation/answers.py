"""The answers of one stage, kept one by one as they are written, so that a killed run asks for the rest alone."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from stayaligned.core.files import writable
from stayaligned.core.records import Completion, Example, PromptSet
from stayaligned.evaluation.endpoint.client import Endpoint
from stayaligned.evaluation.served import complete_over_endpoint
from stayaligned.hf.generation.generate import Generation, complete_each

Progress = Callable[[str, float], None]
Ask = Callable[[PromptSet, Sequence[Example], frozenset[int]], Iterator[tuple[int, Completion]]]
"""Answers to the examples whose numbers are not among those given, each with its number, in any order."""


class _Line(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    index: int
    completion: Completion


class Journal:
    """Answers in a file that only grows; a line that a kill cut short is dropped."""

    def __init__(self, descriptor: int, lines: Sequence[_Line]) -> None:
        self._descriptor, self._lines = descriptor, lines

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: Path) -> Generator[Journal]:
        """The journal in `path`, made if it is not there.

        Raises:
            StayalignedError: if it can't be written.
        """
        with writable(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            try:
                content = path.read_bytes()
                lines: list[_Line] = []
                sound = 0
                for line in content.splitlines(keepends=True):
                    try:
                        if not line.endswith(b"\n"):
                            break
                        lines.append(_Line.model_validate_json(line))
                    except ValidationError:
                        break
                    sound += len(line)
                os.ftruncate(descriptor, sound)
                yield cls(descriptor, lines)
            finally:
                os.close(descriptor)

    def known(self, prompt_set: PromptSet, examples: Sequence[Example]) -> dict[int, Completion]:
        """The kept answers to these examples, by their number."""
        return {
            line.index: line.completion
            for line in self._lines
            if line.completion.prompt_set == prompt_set
            and line.index < len(examples)
            and (line.completion.id, line.completion.prompt) == (examples[line.index].id, examples[line.index].prompt)
        }

    def keep(self, index: int, completion: Completion) -> None:
        """Keep one answer: a killed process loses none that was kept, a power cut may cost the last ones."""
        line = _Line(index=index, completion=completion).model_dump_json().encode() + b"\n"
        while line:  # a disk that fills up may take a part
            line = line[os.write(self._descriptor, line) :]


def ask_model(model: Any, tokenizer: Any, settings: Generation) -> Ask:
    """Asks a model in this process; see `stayaligned.hf.generation.generate.generate`."""

    def ask(
        prompt_set: PromptSet, examples: Sequence[Example], known: frozenset[int]
    ) -> Iterator[tuple[int, Completion]]:
        return complete_each(model, tokenizer, examples, prompt_set, settings, without=known)

    return ask


def ask_server(settings: Generation, endpoint: Endpoint) -> Ask:
    """Asks a model that a server holds; see `stayaligned.evaluation.served.complete_over_endpoint`."""

    def ask(
        prompt_set: PromptSet, examples: Sequence[Example], known: frozenset[int]
    ) -> Iterator[tuple[int, Completion]]:
        places = [index for index in range(len(examples)) if index not in known]
        for index, completion in complete_over_endpoint(
            endpoint,
            [examples[place] for place in places],
            prompt_set,
            max_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            seed=settings.seed if settings.temperature else None,
        ):
            yield places[index], completion

    return ask


def answer_all(
    journal: Path, prompt_sets: Mapping[PromptSet, Sequence[Example]], ask: Ask, progress: Progress
) -> list[Completion]:
    """The answer to every example, in order: those in the journal, and of `ask` the others.

    Raises:
        StayalignedError: if the journal can't be written.
    """
    rows: list[Completion] = []
    with Journal.open(journal) as kept:
        for prompt_set, examples in prompt_sets.items():
            found = kept.known(prompt_set, examples)
            if len(found) < len(examples):
                for index, completion in ask(prompt_set, examples, frozenset(found)):
                    kept.keep(index, completion)
                    found[index] = completion
                    progress(f"generate {prompt_set}", len(found) / len(examples))
            rows += [found[index] for index in range(len(examples))]
    return rows
