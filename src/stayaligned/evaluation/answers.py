"""The answers of one stage, kept one by one as they are written, so that a killed run asks for the rest alone."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from stayaligned.core.errors import StayalignedError
from stayaligned.core.files import writable
from stayaligned.core.progress import Progress
from stayaligned.core.records import Completion, Example, PromptSet
from stayaligned.core.settings import Endpoint, Generation
from stayaligned.evaluation.endpoint.client import Failure, ask
from stayaligned.evaluation.endpoint.cost import Meter
from stayaligned.hf.generation.generate import complete_each

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

    def ask_more(
        prompt_set: PromptSet, examples: Sequence[Example], known: frozenset[int]
    ) -> Iterator[tuple[int, Completion]]:
        return complete_each(model, tokenizer, examples, prompt_set, settings, without=known)

    return ask_more


def ask_server(settings: Generation, endpoint: Endpoint) -> Ask:
    """Asks a model that a server holds; see `complete_over_endpoint`."""

    def ask_more(
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

    return ask_more


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


def complete_over_endpoint(
    endpoint: Endpoint,
    examples: Sequence[Example],
    prompt_set: PromptSet,
    *,
    max_tokens: int,
    temperature: float | None = 0.0,
    seed: int | None = None,
    meter: Meter | None = None,
) -> Iterator[tuple[int, Completion]]:
    """Each example's index with its completion, as they come: a caller that keeps each one can go on after a kill.

    The server's own chat template is used, and its tokenizer counts `max_tokens`. Temperature 0 asks for the likeliest
    tokens; servers differ in the last bits, so two of them may part at a near tie.

    Raises:
        StayalignedError: if the server fails as a whole (see `ask`), or, after all others were yielded, if
            some examples got no answer: an evaluation of the rest would be one of easier prompts.
    """
    lacking: dict[int, Failure] = {}
    conversations = [example.prompt for example in examples]
    for index, answer in ask(
        endpoint, conversations, max_tokens=max_tokens, temperature=temperature, seed=seed, meter=meter
    ):
        if isinstance(answer, Failure):
            lacking[index] = answer
            continue
        # JSON can spell half of a surrogate pair, which no file of text can hold.
        text = answer.text.encode("utf-8", "replace").decode()
        yield index, Completion.of(examples[index], prompt_set, text, finished=answer.finished)
    if lacking:
        first = min(lacking)
        raise StayalignedError(
            f"{endpoint.model} at {endpoint.base_url} gave no answer to {len(lacking)} of {len(examples)} {prompt_set} "
            f"prompts; {examples[first].id!r}: {lacking[first].reason}",
            hint="What was answered is kept: rerun to ask for these alone.",
        )
