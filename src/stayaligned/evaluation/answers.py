"""Completions of one stage, stored as model or server return them, so that a killed run generates only the rest."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from stayaligned.core.errors import StayalignedError
from stayaligned.core.files import writable
from stayaligned.core.progress import Progress
from stayaligned.core.records import Completion, Example, Message, PromptSet, Record
from stayaligned.core.settings import Endpoint, Generation, ServedModel
from stayaligned.core.thoughts import join_thoughts
from stayaligned.evaluation.endpoint.client import Failure, ask
from stayaligned.evaluation.endpoint.cost import Meter
from stayaligned.evaluation.endpoint.replies import Reply

_PROBES = 8
_PROBE_TOKENS = 48
"""Size of the probe of an adapter: prompts, and tokens of each completion."""
_log = logging.getLogger(__name__)
Prompt = tuple[Message, ...]
"""A conversation that ends with the user's turn."""
Ask = Callable[[PromptSet, Sequence[Example], frozenset[int]], Iterator[tuple[int, Completion]]]
"""Yields index and completion of each example except those with the given indices, in any order."""


class _Line(Record):
    index: int
    completion: Completion


class Journal:
    """Completions in a file that only grows; an incomplete last line is dropped."""

    def __init__(self, descriptor: int, lines: Sequence[_Line]) -> None:
        self._descriptor, self._lines = descriptor, lines

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: Path) -> Generator[Journal]:
        """Open the journal in `path`, or create it.

        Raises:
            StayalignedError: if the file can't be written.
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
        """Return the stored completions of these examples, by index."""
        return {
            line.index: line.completion
            for line in self._lines
            if line.completion.prompt_set == prompt_set
            and line.index < len(examples)
            and (line.completion.id, line.completion.prompt) == (examples[line.index].id, examples[line.index].prompt)
        }

    def store(self, index: int, completion: Completion) -> None:
        """Store one completion: it survives a killed process, but not always a power failure."""
        line = _Line(index=index, completion=completion).model_dump_json().encode() + b"\n"
        while line:  # a full disk may accept a part only
            line = line[os.write(self._descriptor, line) :]


def ask_model(model: Any, tokenizer: Any, settings: Generation) -> Ask:
    """Return a function that generates with a model in this process; see `stayaligned.hf.generation.generate`."""
    from stayaligned.hf.generation.generate import complete_each

    def ask_more(
        prompt_set: PromptSet, examples: Sequence[Example], known: frozenset[int]
    ) -> Iterator[tuple[int, Completion]]:
        used = settings.sampling() if prompt_set == "sampled" else settings
        return complete_each(model, tokenizer, examples, prompt_set, used, without=known)

    return ask_more


def ask_server(settings: Generation, endpoint: Endpoint, template_arguments: Mapping[str, Any] | None = None) -> Ask:
    """Return a function that asks a server; see `complete_over_endpoint`."""

    def ask_more(
        prompt_set: PromptSet, examples: Sequence[Example], known: frozenset[int]
    ) -> Iterator[tuple[int, Completion]]:
        missing = [index for index in range(len(examples)) if index not in known]
        used = settings.sampling() if prompt_set == "sampled" else settings
        # A server draws the same completion twice from one seed: each sample of a prompt has its own.
        seeds = [used.seed + index % max(1, settings.samples) for index in missing]
        for index, completion in complete_over_endpoint(
            endpoint,
            [examples[index] for index in missing],
            prompt_set,
            max_tokens=used.max_new_tokens,
            temperature=used.temperature,
            seed=seeds if prompt_set == "sampled" else used.seed if used.temperature else None,
            template_arguments=template_arguments,
        ):
            yield missing[index], completion

    return ask_more


@dataclass(frozen=True)
class Form:
    """How the prompts of one set are asked, and how their completions are read."""

    ask: Callable[[Prompt], Prompt]
    """Returns the conversation that the user of the model asks for a prompt."""
    read: Callable[[str], str] = str
    """Returns the final answer as it is judged."""


def ask_in_forms(ask: Ask, forms: Mapping[PromptSet, Form], serve: Callable[[Prompt], Prompt]) -> Ask:
    """Return a function that asks each prompt in its set's form, and that in the form that `serve` gives it.

    A completion records the prompt as it was given and, if they differ, the conversation in the set's form and the text
    that was written. What `serve` adds is a part of the defense, and is not recorded.
    """

    def ask_more(
        prompt_set: PromptSet, examples: Sequence[Example], known: frozenset[int]
    ) -> Iterator[tuple[int, Completion]]:
        form = forms.get(prompt_set)
        asked = [example.prompt if form is None else form.ask(example.prompt) for example in examples]
        served = [
            example.model_copy(update={"prompt": serve(conversation)})
            for example, conversation in zip(examples, asked, strict=True)
        ]
        for index, completion in ask(prompt_set, served, known):
            prompt = examples[index].prompt
            recorded = {"prompt": prompt, "asked": asked[index] if asked[index] != prompt else ()}
            read = completion if form is None else _read_answer(completion, form.read)
            yield index, read.model_copy(update=recorded)

    return ask_more


def _read_answer(completion: Completion, read: Callable[[str], str]) -> Completion:
    """Return a completion with its final answer as `read` returns it; one without a final answer as it is."""
    found = completion.split()
    if found.answer is None:
        return completion
    text = read(found.answer)
    if text == found.answer:
        return completion
    return completion.model_copy(update={"text": join_thoughts(found.thoughts, text), "written": completion.text})


def answer_all(
    journal: Path, prompt_sets: Mapping[PromptSet, Sequence[Example]], ask: Ask, progress: Progress
) -> list[Completion]:
    """Return the completion of every example, in order: from the journal, the missing ones from `ask`.

    Raises:
        StayalignedError: if the journal can't be written.
    """
    rows: list[Completion] = []
    with Journal.open(journal) as stored:
        for prompt_set, examples in prompt_sets.items():
            found = stored.known(prompt_set, examples)
            if len(found) < len(examples):
                for index, completion in ask(prompt_set, examples, frozenset(found)):
                    stored.store(index, completion)
                    found[index] = completion
                    progress(
                        f"generate {prompt_set}", len(found) / len(examples), f"{len(found)} of {len(examples)} prompts"
                    )
            rows += [found[index] for index in range(len(examples))]
    return rows


def complete_over_endpoint(
    endpoint: Endpoint,
    examples: Sequence[Example],
    prompt_set: PromptSet,
    *,
    max_tokens: int,
    temperature: float | None = 0.0,
    seed: int | Sequence[int] | None = None,
    template_arguments: Mapping[str, Any] | None = None,
    meter: Meter | None = None,
) -> Iterator[tuple[int, Completion]]:
    """Yield each example's index and completion as they arrive.

    The server applies its own chat template, with `template_arguments` if it reads `chat_template_kwargs` (vLLM,
    llama.cpp and SGLang do), and with its own date. Its tokenizer counts `max_tokens`. At temperature 0 the server
    returns the most likely tokens; rounding differs between servers, so near ties may be decided differently.

    Thoughts that the server separates from the text are put before it, between `<think>` marks. A completion that is
    not what the model wrote (filtered, a tool call, tokens without text) counts as missing. Where the server does not
    say whether a completion ended or was cut, its number of tokens decides, with a warning.

    Raises:
        StayalignedError: if the server fails as a whole (see `ask`), or, after all completions were yielded, if some
            examples have none: an evaluation without them would be one of easier prompts.
    """
    failures: dict[int, str] = {}
    undecided = 0
    conversations = [example.prompt for example in examples]
    for index, reply in ask(
        endpoint,
        conversations,
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        template_arguments=template_arguments,
        meter=meter,
    ):
        problem = reply.reason if isinstance(reply, Failure) else _withheld(reply)
        if problem or isinstance(reply, Failure):
            failures[index] = problem
            continue
        finished = reply.finished
        if finished is None:
            undecided += 1
            finished = reply.usage.output_tokens < max_tokens
        # JSON can contain one half of a surrogate pair, which can't be written to a text file.
        text = join_thoughts(reply.thoughts, reply.text).encode("utf-8", "replace").decode()
        yield index, Completion.of(examples[index], prompt_set, text, finished=finished)
    if undecided:
        _log.warning(
            "%s at %s does not say why %d %s completions ended (`finish_reason`): those of %d tokens, or of unknown "
            "length, count as cut",
            *(endpoint.model, endpoint.base_url, undecided, prompt_set, max_tokens),
        )
    if failures:
        first = min(failures)
        raise StayalignedError(
            f"{endpoint.model} at {endpoint.base_url} did not answer {len(failures)} of {len(examples)} {prompt_set} "
            f"prompts; {examples[first].id!r}: {failures[first]}",
            hint="The other completions are stored: rerun to ask for the missing ones only.",
        )


def check_adapter_is_live(
    endpoint: ServedModel, examples: Sequence[Example], template_arguments: Mapping[str, Any] | None = None
) -> None:
    """Check that the served model answers differently from its base model, if the endpoint names one.

    Asks both for the beginning of their completions of at most eight prompts, at temperature 0.

    Raises:
        StayalignedError: if all completions are equal, or the server does not answer.
    """
    if endpoint.base_model is None:
        return
    conversations = [example.prompt for example in examples[:_PROBES]]
    found: list[dict[int, tuple[str, str]]] = []
    for name in (endpoint.model, endpoint.base_model):
        asked = endpoint.model_copy(update={"model": name})
        replies = dict(
            ask(asked, conversations, max_tokens=_PROBE_TOKENS, template_arguments=template_arguments),
        )
        failed = next((reply for reply in replies.values() if isinstance(reply, Failure)), None)
        if failed is not None:
            raise StayalignedError(
                f"{name} at {endpoint.base_url} did not answer the probe of its adapter: {failed.reason}",
                hint="Check `endpoint.model` and `endpoint.base_model`.",
            )
        found.append({i: (reply.text, reply.thoughts) for i, reply in replies.items() if isinstance(reply, Reply)})
    if found[0] == found[1]:
        raise StayalignedError(
            f"{endpoint.model} and its base model {endpoint.base_model} at {endpoint.base_url} gave the same "
            f"completions of {len(conversations)} prompts: the adapter is not loaded, or changes nothing",
            hint="Check that the server applies it: a request to the base model's name must differ.",
        )


def _withheld(reply: Reply) -> str:
    """Return why a reply is not the whole completion; empty if it is."""
    if reply.calls_tools:
        return "the completion calls a tool, though none was offered"
    return reply.withheld and f"the server returned {reply.withheld}"
