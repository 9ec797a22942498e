"""Answers of a model that a server holds: the same rows as of a model in this process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import Completion, Example, PromptSet
from stayaligned.evaluation.endpoint.client import Endpoint, Failure
from stayaligned.evaluation.endpoint.cost import Meter


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
        StayalignedError: if the server fails as a whole (see `Endpoint.ask`), or, after all others were yielded, if
            some examples got no answer: an evaluation of the rest would be one of easier prompts.
    """
    lacking: dict[int, Failure] = {}
    conversations = [example.prompt for example in examples]
    for index, answer in endpoint.ask(
        conversations, max_tokens=max_tokens, temperature=temperature, seed=seed, meter=meter
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
