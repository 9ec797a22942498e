"""Prompts to answers: batched, in the order asked, the same whatever the batch. Imports no torch by itself."""

from __future__ import annotations

import copy
import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import Completion, Example, Message, PromptSet
from stayaligned.core.settings import Generation
from stayaligned.hf.features import encode_prompt

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


_log = logging.getLogger(__name__)

_PROBE_TOKENS, _PROBE_PADS = 32, 8
"""Tokens of a prompt, and of padding before them, with which a model is tried."""


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
    answers: list[Generated | None] = [None] * len(prompt_ids)
    for done, (place, answer) in enumerate(_each(model, tokenizer, prompt_ids, settings), start=1):
        answers[place] = answer
        if progress is not None:
            progress(done / len(prompt_ids))
    return [answer for answer in answers if answer is not None]


def _each(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[list[int]],
    settings: Generation,
    *,
    without: frozenset[int] = frozenset(),
) -> Iterator[tuple[int, Generated]]:
    """Each prompt's number and answer, as they end; without some, whose answers are known."""
    import torch

    host = _host(model)
    _refuse_too_long(host, prompt_ids, settings.max_new_tokens)
    keys = _sampling_keys(prompt_ids, settings.seed)
    end_ids = _end_ids(host, tokenizer)
    pad_id = tokenizer.pad_token_id if isinstance(tokenizer.pad_token_id, int) else end_ids[0]
    # Without noise, equal prompts have equal answers.
    same: dict[tuple[int, ...], list[int]] = {}
    for place, ids in enumerate(prompt_ids):
        if place in without:
            continue
        same.setdefault((*ids, place) if settings.temperature else tuple(ids), []).append(place)
    where = list(same.values())
    asked = [prompt_ids[places[0]] for places in where]
    with torch.no_grad(), _bare(host, settings, end_ids, pad_id):
        for row, tokens in _written(host, asked, [keys[places[0]] for places in where], settings, end_ids, pad_id):
            answer = _cut(tokenizer, tokens, end_ids)
            for place in where[row]:
                yield place, answer


def complete(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    prompt_set: PromptSet,
    settings: Generation,
    *,
    progress: Callable[[float], None] | None = None,
) -> list[Completion]:
    """The model's answer to each example's prompt, as the rows that judges and tasks read; see `generate`."""
    found: dict[int, Completion] = {}
    for index, completion in complete_each(model, tokenizer, examples, prompt_set, settings):
        found[index] = completion
        if progress is not None:
            progress(len(found) / len(examples))
    return [found[index] for index in range(len(examples))]


def complete_each(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    prompt_set: PromptSet,
    settings: Generation,
    *,
    without: frozenset[int] = frozenset(),
) -> Iterator[tuple[int, Completion]]:
    """Each example's number with its completion, as they end; without some, whose completions are known.

    Those left out count where samples of equal prompts are told apart: the others are as if none were left out.
    """
    prompt_ids = [encode_prompt(tokenizer, example.prompt) for example in examples]
    for index, answer in _each(model, tokenizer, prompt_ids, settings, without=without):
        yield index, Completion.of(examples[index], prompt_set, answer.text, finished=answer.finished)


@cache
def _say_slow(kind: str) -> None:
    _log.warning("%s takes padding for text: it answers one prompt at a time", kind)


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


def _written(
    host: Any, prompts: Sequence[list[int]], keys: Sequence[str], settings: Generation, end_ids: list[int], pad_id: int
) -> Iterator[tuple[int, list[int]]]:
    """Each prompt's number and the tokens written after it, in the order in which they end."""
    from stayaligned.hf.generation.decoding import decode, has_plain_cache

    together = len(prompts) < 2 or _pads_are_ignored(host, min(prompts, key=len)[-_PROBE_TOKENS:], pad_id)
    if not together:
        _say_slow(type(host).__name__)
    if together and prompts and has_plain_cache(host):
        noise = _Noise(keys, settings.temperature) if settings.temperature else None

        def choose(rows: Sequence[int], logits: Tensor) -> Tensor:
            return (logits if noise is None else noise.add(rows, logits)).argmax(dim=-1)

        yield from decode(
            host,
            prompts,
            settings.memory_mib << 20,
            max_new_tokens=settings.max_new_tokens,
            end_ids=end_ids,
            pad_id=pad_id,
            choose=choose,
        )
        return
    for rows in _batches(host, [len(ids) for ids in prompts], settings, together=together):
        yield from zip(
            rows,
            _answer_batch(host, [prompts[r] for r in rows], [keys[r] for r in rows], settings, pad_id),
            strict=True,
        )


def _answer_batch(
    host: Any, prompts: Sequence[list[int]], keys: Sequence[str], settings: Generation, pad_id: int
) -> list[list[int]]:
    """The tokens written after each prompt, padding included."""
    from transformers import LogitsProcessorList

    from stayaligned.hf.generation.decoding import left_padded

    width = max(map(len, prompts))
    ids, mask = left_padded(prompts, pad_id, width, host.device)
    processors = LogitsProcessorList([_Noise(keys, settings.temperature)] if settings.temperature else [])
    output = host.generate(input_ids=ids, attention_mask=mask, logits_processor=processors)
    return output[:, width:].tolist()


class _Noise:
    """Turns greedy decoding into sampling: argmax(logits/T + g) with g standard Gumbel follows softmax(logits/T).

    Every row has its own generator, on the CPU, so a sample depends neither on the batch nor on the device.
    """

    def __init__(self, keys: Sequence[str], temperature: float) -> None:
        import torch

        self._temperature = temperature
        seeds = [int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") for key in keys]
        self._generators = [torch.Generator().manual_seed(seed >> 1) for seed in seeds]

    def add(self, rows: Sequence[int], logits: Tensor) -> Tensor:
        """(rows, vocabulary) logits of these of the keys, perturbed."""
        import torch

        # Minus the logarithm of an exponential variate is a standard Gumbel one.
        drawn = torch.stack(
            [torch.empty(logits.shape[-1]).exponential_(generator=self._generators[row]) for row in rows]
        )
        noise = -drawn.clamp(min=torch.finfo(torch.float32).tiny).log()
        return logits.float() / self._temperature + noise.to(logits.device)

    def __call__(self, _input_ids: Tensor, scores: Tensor) -> Tensor:
        """`add` to all rows, as transformers calls a processor."""
        return self.add(range(len(scores)), scores)


def _batches(host: Any, lengths: Sequence[int], settings: Generation, *, together: bool) -> Iterator[list[int]]:
    """Row numbers in batches within the budget, the longest prompts first: if memory is short, at once."""
    from stayaligned.hf.generation.memory import rows_at_once

    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    while order:
        fits = rows_at_once(host, settings.memory_mib << 20, lengths[order[0]], settings.max_new_tokens)
        yield order[: fits if together else 1]
        order = order[fits if together else 1 :]


def _pads_are_ignored(host: Any, prompt: list[int], pad_id: int) -> bool:
    """Whether the next token is the same with padding before the prompt; a short prompt feels it most.

    No gradient may reach the embeddings of the padding (exactly none: what is masked is multiplied by 0), and the
    logits must agree with those of the prompt alone, up to half of their digits. The first finds a state that takes
    the padding in, however little; the second one that starts from something else, such as a bias.
    """
    import torch

    from stayaligned.hf.generation.decoding import left_padded

    padded, mask = left_padded([prompt], pad_id, len(prompt) + _PROBE_PADS, host.device)
    embedded: list[Tensor] = []

    def follow(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    hook = host.get_input_embeddings().register_forward_hook(follow)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            logits = host(input_ids=padded, attention_mask=mask, use_cache=False).logits[0, -1].float()
            reached = torch.autograd.grad(logits.square().sum(), embedded)[0][0].abs().amax(dim=-1)
    except RuntimeError:  # what can't be differentiated, or takes too much memory for it, can't be vouched for
        return False
    finally:
        hook.remove()
    if reached[:_PROBE_PADS].ne(0).any() or reached[_PROBE_PADS:].eq(0).all():
        return False
    alone, beside = (
        host.generate(
            input_ids=padded[:, start:],
            attention_mask=mask[:, start:],
            max_new_tokens=1,
            return_dict_in_generate=True,
            output_logits=True,
        ).logits[0]
        for start in (_PROBE_PADS, 0)
    )
    rounding = torch.finfo(host.dtype).eps ** 0.5 * alone.abs().max()
    return bool((alone - beside).abs().max() <= rounding)


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
