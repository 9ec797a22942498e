"""Prompts to answers: batched, in the order asked, the same whatever the batch. Imports no torch by itself."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from stayaligned.errors import StayalignedError
from stayaligned.hf.decoding import Limits, answers
from stayaligned.hf.features import encode_prompt
from stayaligned.records import Completion, Example, Message, PromptSet

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


class Generation(BaseModel):
    """How answers are written; greedy unless a temperature is set."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_new_tokens: int = Field(default=128, ge=1)
    """Tokens after which an answer is cut."""
    memory_mib: float = Field(default=4096, gt=0)
    """What a batch may take beside the weights: cache, activations and logits. One prompt alone is always asked."""
    temperature: float = Field(default=0.0, ge=0)
    """0 takes the likeliest token; above it, samples."""
    seed: int = Field(default=0, ge=0)
    """Of the samples; without meaning at temperature 0."""

    def identity(self) -> dict[str, Any]:
        """What the answers depend on: all but the memory that they may take."""
        return self.model_dump(mode="json", exclude={"memory_mib"})


@dataclass(frozen=True, slots=True)
class Generated:
    """One answer."""

    text: str
    finished: bool
    """False where it was cut at the token limit."""
    tokens: tuple[int, ...]
    """Its token ids, without the end token."""


def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[Message]],
    settings: Generation,
    *,
    progress: Callable[[float], None] | None = None,
) -> list[Generated]:
    """One answer per prompt, in order.

    In fp32 an answer does not depend on its neighbors: not on the batch's size, the prompts' order, or (when
    sampling) on anything but its own prompt, the seed, and how often the same prompt came before. In 16 bits
    rounding depends on the batch's shape, so that near ties can fall either way.

    What differs from the papers' code: it answers one prompt at a time, cuts the answer out of the decoded text
    by its prompt's length or by a marker that may occur in it, and lets the model's own `generation_config`
    (temperature, penalties) into a "greedy" run. Here the cut is by token position, and only the end tokens are
    taken from that file.

    Args:
        model: a causal language model, or one with a PEFT adapter.
        tokenizer: with a chat template.
        prompts: conversations that end with the user's turn.
        settings: length, sampling and batch budget.
        progress: called with the share that is done, after each batch.

    Raises:
        StayalignedError: if a prompt leaves no room for an answer in the model's context.
    """
    prompt_ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    return generate_after(model, tokenizer, prompt_ids, settings, progress=progress)


def generate_after(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[list[int]],
    settings: Generation,
    *,
    progress: Callable[[float], None] | None = None,
) -> list[Generated]:
    """`generate`, of prompts that are token ids already: of guards, whose prompts follow no chat template.

    Raises:
        StayalignedError: as `generate`.
    """
    found = dict(iter_generated(model, tokenizer, prompt_ids, settings, progress=progress))
    return [found[row] for row in range(len(prompt_ids))]


def iter_generated(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[list[int]],
    settings: Generation,
    *,
    rows: Sequence[int] | None = None,
    progress: Callable[[float], None] | None = None,
) -> Iterator[tuple[int, Generated]]:
    """Row and answer of each prompt, in the order in which they end; equal greedy prompts are answered once.

    Args:
        model: as `generate`.
        tokenizer: as `generate`.
        prompt_ids: as `generate_after`.
        settings: as `generate`.
        rows: the prompts to answer; all if not given. The others still count for what samples depend on.
        progress: called with the share of them that is done.

    Raises:
        StayalignedError: as `generate`.
    """
    host = _host(model)
    _refuse_too_long(host, prompt_ids, settings.max_new_tokens)
    keys = _sampling_keys(prompt_ids, settings.seed)
    end_ids = _end_ids(host, tokenizer)
    pad_id = tokenizer.pad_token_id if isinstance(tokenizer.pad_token_id, int) else end_ids[0]
    limits = Limits(
        max_new_tokens=settings.max_new_tokens,
        end_ids=tuple(end_ids),
        pad_id=pad_id,
        temperature=settings.temperature,
        memory_bytes=int(settings.memory_mib * 2**20),
    )
    asked: dict[object, list[int]] = {}
    for row in range(len(prompt_ids)) if rows is None else rows:
        asked.setdefault(row if settings.temperature else tuple(prompt_ids[row]), []).append(row)
    same = list(asked.values())
    done = 0
    with _bare(host, settings, end_ids, pad_id):
        first = [group[0] for group in same]
        for place, tokens in answers(host, [prompt_ids[r] for r in first], [keys[r] for r in first], limits):
            answer = _cut(tokenizer, tokens, end_ids)
            for row in same[place]:
                yield row, answer
            done += len(same[place])
            if progress is not None:
                progress(done / sum(map(len, same)))


def complete(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    prompt_set: PromptSet,
    settings: Generation,
    *,
    known: Mapping[str, Completion] | None = None,
    keep: Callable[[Completion], None] = lambda _completion: None,
    progress: Callable[[float], None] | None = None,
) -> list[Completion]:
    """The model's answer to each example's prompt, as the rows that judges and tasks read; see `generate`.

    Args:
        model: as `generate`.
        tokenizer: as `generate`.
        examples: with ids that differ.
        prompt_set: what the prompts ask about.
        settings: as `generate`.
        known: answers that are there already, by the example's id; these are not written again.
        keep: called with each new answer as soon as it has ended.
        progress: called with the share that is done.
    """
    found = dict(known or {})
    prompt_ids = [encode_prompt(tokenizer, example.prompt) for example in examples]
    rows = [row for row, example in enumerate(examples) if example.id not in found]
    for row, answer in iter_generated(model, tokenizer, prompt_ids, settings, rows=rows, progress=progress):
        example = examples[row]
        found[example.id] = Completion(
            id=example.id,
            prompt_set=prompt_set,
            prompt=example.prompt,
            text=answer.text,
            reference=example.completion,
            category=example.category,
            finished=answer.finished,
        )
        keep(found[example.id])
    return [found[example.id] for example in examples]


def _host(model: Any) -> Any:
    """The transformers model that generates: PEFT's wrapper copies its own settings over it, so it is passed by."""
    from peft import PeftModel

    return model.get_base_model() if isinstance(model, PeftModel) else model


@contextmanager
def _bare(host: Any, settings: Generation, end_ids: list[int], pad_id: int) -> Generator[None]:
    """Evaluation mode and a generation configuration that holds nothing but ours; both restored.

    `generate` fills whatever its argument leaves open from `model.generation_config`: a chat model's
    temperature or repetition penalty would join a greedy run unseen.
    """
    from transformers import GenerationConfig

    own = host.generation_config
    training = [module for module in host.modules() if module.training]
    host.generation_config = GenerationConfig(
        max_new_tokens=settings.max_new_tokens, do_sample=False, eos_token_id=end_ids, pad_token_id=pad_id
    )
    host.eval()
    try:
        yield
    finally:
        host.generation_config = own
        for module in training:
            module.training = True


def _sampling_keys(prompts: Sequence[Sequence[int]], seed: int) -> list[str]:
    """What a prompt's samples depend on: the seed, its tokens, and which occurrence of them it is."""
    seen: Counter[tuple[int, ...]] = Counter()
    keys: list[str] = []
    for ids in map(tuple, prompts):
        keys.append(f"{seed}:{seen[ids]}:{ids}")
        seen[ids] += 1
    return keys


def _end_ids(host: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end an answer: the checkpoint's (chat models name several), and the tokenizer's."""
    named = host.generation_config.eos_token_id
    found = [named] if isinstance(named, int) else list(named or [])
    if isinstance(tokenizer.eos_token_id, int):
        found.append(tokenizer.eos_token_id)
    if not found:
        raise StayalignedError(
            "neither the model's generation configuration nor its tokenizer names an end-of-sequence token",
            hint="Set `eos_token_id` in generation_config.json.",
        )
    return sorted(set(found))


def config_ending_with(model: PreTrainedModel, end: int | None) -> GenerationConfig:
    """A copy of a model's generation configuration that also ends an answer at the token `end`; None adds nothing.

    Raises:
        StayalignedError: if it can't be saved once it has changed, because it contradicts itself.
    """
    config = copy.deepcopy(model.generation_config)
    named = config.eos_token_id
    ends = [named] if isinstance(named, int) else list(named or [])
    if end is not None and end not in ends:
        config.eos_token_id = sorted([*ends, end])
        try:
            config.validate(strict=True)
        except ValueError as error:
            raise StayalignedError(
                f"generation_config.json of {model.name_or_path} contradicts itself: {' '.join(str(error).split())}",
                hint="Mend it there: where it names a temperature or top_p, it needs `do_sample: true`.",
            ) from None
    return config


def _refuse_too_long(host: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    limit = getattr(host.config.get_text_config(), "max_position_embeddings", None)
    longest = max(map(len, prompts), default=0)
    if isinstance(limit, int) and longest + max_new_tokens > limit:
        room = limit - longest
        raise StayalignedError(
            f"a prompt of {longest} tokens and an answer of up to {max_new_tokens} exceed the model's context, {limit}",
            hint=f"Set `generation.max_new_tokens` to {room} or less." if room > 0 else "Leave that prompt out.",
        )


def _cut(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], end_ids: Sequence[int]) -> Generated:
    """The answer up to its end token."""
    end = next((place for place, token in enumerate(tokens) if token in end_ids), None)
    own = list(tokens[:end])
    text = tokenizer.decode(own, skip_special_tokens=True)
    return Generated(str(text), finished=end is not None, tokens=tuple(own))
