"""Generation of completions: batched, returned in the order of the prompts, and the same whatever the batch.

Importing this module imports no torch.
"""

from __future__ import annotations

import copy
import hashlib
import logging
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import Completion, Example, Message, PromptSet
from stayaligned.core.settings import Generation
from stayaligned.core.thoughts import is_mark, kept_tokens, opened_thoughts
from stayaligned.hf.features import encode_prompt, end_of_answer, padding_id, refuse_unknown_tokens
from stayaligned.hf.generation.batching import pad_left, split_by_memory
from stayaligned.hf.hosts import cache_has_only_attention

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


_log = logging.getLogger(__name__)

_PROBE_TOKENS, _PROBE_PADS = 32, 8
"""Number of prompt tokens, and of padding tokens before them, in the probe for padding."""
_PROMPT_END = 48
"""Number of tokens at the end of a prompt that are searched for an opening mark of thoughts."""
_DROPPED_SHARE = 4
"""Finished rows leave a batch once they are one in this many of its rows: each time, the others' cache is copied."""


@dataclass(frozen=True, slots=True)
class Generated:
    """One generated text."""

    text: str
    """The text with the marks of its thoughts, and without all other special tokens."""
    finished: bool
    """Whether the model wrote an end token; False if the text was cut at the token limit."""
    tokens: tuple[int, ...]
    """Token ids of the text, without the end token."""


def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[Message]],
    settings: Generation,
) -> list[Generated]:
    """Return one generated text per prompt, in order.

    In fp32 a text does not depend on the other prompts: not on the size of the batch, on the order of the prompts, or
    (when sampling) on anything but its own prompt, the seed, and how often the same prompt came before. In 16 bits
    rounding depends on the shape of the batch and may decide near ties.

    Differences from the papers' code, which generates for one prompt at a time, finds the answer in the decoded text
    by the length of the prompt or by a marker that may occur in it, and applies the model's own `generation_config`
    (temperature, penalties) to a "greedy" run: here the answer is cut by token position, and only the end tokens are
    taken from that file.

    Args:
        model: a causal language model, or one with a PEFT adapter.
        tokenizer: its tokenizer, with a chat template.
        prompts: conversations that end with the user's turn.
        settings: length, sampling and memory budget.

    Raises:
        StayalignedError: if a prompt leaves no room for a completion in the model's context.
    """
    prompt_ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    return generate_from_ids(model, tokenizer, prompt_ids, settings, end=end_of_answer(tokenizer))


def generate_from_ids(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[list[int]],
    settings: Generation,
    *,
    end: int | None = None,
) -> list[Generated]:
    """Return one generated text per prompt for prompts that are token ids already; see `generate`.

    Args:
        model: see `generate`.
        tokenizer: see `generate`.
        prompt_ids: the prompts.
        settings: see `generate`.
        end: a token that also ends a completion, such as the chat template's.

    Raises:
        StayalignedError: as `generate`.
    """
    texts = dict(_generate_each(model, tokenizer, prompt_ids, settings, end))
    return [texts[index] for index in range(len(prompt_ids))]


def complete_each(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    prompt_set: PromptSet,
    settings: Generation,
    *,
    without: frozenset[int] = frozenset(),
) -> Iterator[tuple[int, Completion]]:
    """Yield each example's index and completion as they finish.

    Where the prompt ends with an opening mark of thoughts (`<think>`), the completion's text begins with that mark.

    Args:
        model: see `generate`.
        tokenizer: see `generate`.
        examples: the prompts, with ids, references and categories.
        prompt_set: stored in each completion.
        settings: see `generate`.
        without: indices to skip because their completions are known. The other completions do not change: skipped
            examples still count as earlier occurrences of an equal prompt.
    """
    prompt_ids = [encode_prompt(tokenizer, example.prompt) for example in examples]
    end = end_of_answer(tokenizer)
    for index, found in _generate_each(model, tokenizer, prompt_ids, settings, end, without=without):
        opening = opened_in_prompt(tokenizer, examples[index].prompt, prompt_ids[index])
        yield index, Completion.of(examples[index], prompt_set, opening + found.text, finished=found.finished)


def opened_in_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Message], ids: Sequence[int]) -> str:
    """Return the opening mark of thoughts with which the template ends a prompt; empty if it ends with none."""
    opening = opened_thoughts(str(tokenizer.decode(list(ids[-_PROMPT_END:]), skip_special_tokens=False)))
    if not opening:
        return ""
    rendered = str(tokenizer.decode(list(ids), skip_special_tokens=False)).rstrip()
    is_the_users = len(opening.strip()) <= len(own := prompt[-1].content.rstrip()) and rendered.endswith(own)
    return "" if is_the_users else opening


def config_ending_with(model: PreTrainedModel, end: int | None) -> GenerationConfig:
    """Return a copy of a model's generation configuration that also ends at the token `end`; None adds nothing.

    Raises:
        StayalignedError: if the changed configuration can't be saved because it contradicts itself.
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
                hint="Fix it there: a configuration with a temperature or top_p needs `do_sample: true`.",
            ) from None
    return config


def _generate_each(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[list[int]],
    settings: Generation,
    end: int | None,
    *,
    without: frozenset[int] = frozenset(),
) -> Iterator[tuple[int, Generated]]:
    """Yield each prompt's index and generated text as they finish, except for the indices in `without`."""
    import torch

    host = _unwrap_adapter(model)
    _refuse_too_long(host, prompt_ids, settings.max_new_tokens)
    keys = _sampling_keys(prompt_ids, settings.seed)
    end_ids = _end_ids(host, tokenizer, end)
    refuse_unknown_tokens(tokenizer, host, prompt_ids)
    pad_id = padding_id(tokenizer, host)
    # Without sampling noise, equal prompts have equal completions: each is generated once.
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, ids in enumerate(prompt_ids):
        if index not in without:
            groups.setdefault((*ids, index) if settings.temperature else tuple(ids), []).append(index)
    indices = list(groups.values())
    distinct = [prompt_ids[group[0]] for group in indices]
    with torch.no_grad(), _own_configuration(host, settings, end_ids, pad_id):
        can_batch = len(distinct) < 2 or _ignores_padding(host, min(distinct, key=len)[-_PROBE_TOKENS:], pad_id)
        if can_batch:
            batches = split_by_memory(
                host, list(map(len, distinct)), settings.memory_mib << 20, settings.max_new_tokens
            )
        else:
            _warn_unbatched(type(host).__name__)
            batches = iter([[row] for row in range(len(distinct))])
        for batch in batches:
            prompts = [distinct[row] for row in batch]
            noise = _Noise([keys[indices[row][0]] for row in batch], settings.temperature)
            for place, tokens in _generate_batch(host, prompts, noise, settings.max_new_tokens, end_ids, pad_id):
                found = _cut_at_end(tokenizer, tokens, end_ids)
                for index in indices[batch[place]]:
                    yield index, found


def _generate_batch(
    host: Any, prompts: Sequence[list[int]], noise: _Noise, max_new_tokens: int, end_ids: list[int], pad_id: int
) -> Iterator[tuple[int, list[int]]]:
    """Yield the number and the generated tokens, padding included, of each prompt of one batch.

    A finished row would be computed until all rows of its batch have finished. So generation stops when enough rows
    have finished, and continues with the cache of the others.
    """
    import torch
    from transformers import LogitsProcessorList, StoppingCriteriaList

    width = max(map(len, prompts))
    ids, mask = pad_left(prompts, pad_id, width, host.device)
    can_drop = cache_has_only_attention(host)
    places, kv_cache = list(range(len(prompts))), None
    while places:
        finished = _FinishedRows(len(places), end_ids, can_drop, host.device)
        output = host.generate(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=kv_cache,
            max_new_tokens=width + max_new_tokens - ids.shape[1],
            logits_processor=LogitsProcessorList([noise] if noise.temperature else []),
            stopping_criteria=StoppingCriteriaList([finished]),
            return_dict_in_generate=True,
        )
        ids = output.sequences
        is_over = finished.rows if ids.shape[1] < width + max_new_tokens else torch.ones_like(finished.rows)
        for row in is_over.nonzero().flatten().tolist():
            yield places[row], ids[row, width:].tolist()
        going_on = is_over.logical_not().nonzero().flatten()
        places = [places[row] for row in going_on.tolist()]
        if places:
            kv_cache = output.past_key_values
            kv_cache.batch_select_indices(going_on)
            mask = torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)[going_on]
            ids, noise = ids[going_on], noise.select(going_on.tolist())


class _FinishedRows:
    """A stopping criterion of `generate`: enough rows have written an end token."""

    def __init__(self, count: int, end_ids: list[int], can_drop: bool, device: Any) -> None:
        import torch

        self.rows = torch.zeros(count, dtype=torch.bool, device=device)
        """Whether each row has written an end token."""
        self._end_ids = torch.tensor(end_ids, device=device)
        self._enough = -(-count // _DROPPED_SHARE) if can_drop else count

    def __call__(self, input_ids: Tensor, _scores: Any, **_kwargs: Any) -> Tensor:
        """Return whether to stop, once per row: all rows stop together."""
        import torch

        self.rows |= torch.isin(input_ids[:, -1], self._end_ids)
        return (self.rows.sum() >= self._enough).expand(len(self.rows))


class _Noise:
    """A logits processor that turns greedy decoding into sampling.

    argmax(logits/T + g) with standard Gumbel g follows softmax(logits/T). Every row has its own generator, on the CPU,
    so that a sample depends neither on the batch nor on the device.
    """

    def __init__(self, keys: Sequence[str], temperature: float) -> None:
        import torch

        self.temperature = temperature
        seeds = [int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") for key in keys]
        self._generators = [torch.Generator().manual_seed(seed >> 1) for seed in seeds]

    def select(self, rows: Sequence[int]) -> _Noise:
        """Return the noise of some rows, which continues where it is."""
        selected = copy.copy(self)
        selected._generators = [self._generators[row] for row in rows]
        return selected

    def __call__(self, _input_ids: Tensor, logits: Tensor) -> Tensor:
        """Return (rows, vocabulary) logits with noise."""
        import torch

        # Minus the logarithm of an exponential variate is a standard Gumbel variate.
        drawn = torch.stack([torch.empty(logits.shape[-1]).exponential_(generator=each) for each in self._generators])
        noise = -drawn.clamp(min=torch.finfo(torch.float32).tiny).log()
        return logits.float() / self.temperature + noise.to(logits.device)


@contextmanager
def _own_configuration(host: Any, settings: Generation, end_ids: list[int], pad_id: int) -> Generator[None]:
    """Within the block, put the model in evaluation mode with a generation configuration that holds only our settings.

    `generate` takes what its arguments leave open from `model.generation_config`: a chat model's temperature or
    repetition penalty would silently apply to a greedy run.
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


@cache
def _warn_unbatched(kind: str) -> None:
    _log.warning("%s does not ignore padding: it generates for one prompt at a time", kind)


def _ignores_padding(host: Any, prompt: list[int], pad_id: int) -> bool:
    """Return whether the next token is the same with padding before the prompt; use a short prompt.

    No gradient may reach the embeddings of the padding (it is exactly 0 where the attention mask works), and the
    logits must agree with those of the prompt alone up to half of their digits. The gradient detects a state that
    takes in any padding; the logits detect one that starts from something else, such as a bias.
    """
    import torch

    padded, mask = pad_left([prompt], pad_id, len(prompt) + _PROBE_PADS, host.device)
    embedded: list[Tensor] = []

    def track(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    hook = host.get_input_embeddings().register_forward_hook(track)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            logits = host(input_ids=padded, attention_mask=mask, use_cache=False).logits[0, -1].float()
            gradient = torch.autograd.grad(logits.square().sum(), embedded)[0][0].abs().amax(dim=-1)
    except RuntimeError:  # not differentiable, or too little memory for it
        return False
    finally:
        hook.remove()
    if gradient[:_PROBE_PADS].ne(0).any() or gradient[_PROBE_PADS:].eq(0).all():
        return False
    alone, beside_padding = (
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
    return bool((alone - beside_padding).abs().max() <= rounding)


def _unwrap_adapter(model: Any) -> Any:
    """Return the transformers model that generates: PEFT's wrapper would copy its own settings over it."""
    from peft import PeftModel

    return model.get_base_model() if isinstance(model, PeftModel) else model


def _sampling_keys(prompts: Sequence[Sequence[int]], seed: int) -> list[str]:
    """Return what each prompt's sample depends on: the seed, its tokens, and how often they occurred before."""
    occurrences: Counter[tuple[int, ...]] = Counter()
    keys: list[str] = []
    for ids in map(tuple, prompts):
        keys.append(f"{seed}:{occurrences[ids]}:{ids}")
        occurrences[ids] += 1
    return keys


def _end_ids(host: Any, tokenizer: PreTrainedTokenizerBase, end: int | None) -> list[int]:
    """Return the tokens that end a completion: the checkpoint's (chat models have several), the tokenizer's, `end`."""
    named = host.generation_config.eos_token_id
    end_ids = [named] if isinstance(named, int) else list(named or [])
    if isinstance(tokenizer.eos_token_id, int):
        end_ids.append(tokenizer.eos_token_id)
    if end is not None:
        end_ids.append(end)
    if not end_ids:
        raise StayalignedError(
            "neither the model's generation configuration nor its tokenizer has an end-of-sequence token",
            hint="Set `eos_token_id` in generation_config.json.",
        )
    return sorted(set(end_ids))


def _refuse_too_long(host: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    limit = getattr(host.config.get_text_config(), "max_position_embeddings", None)
    longest = max(map(len, prompts), default=0)
    if isinstance(limit, int) and longest + max_new_tokens > limit:
        room = limit - longest
        raise StayalignedError(
            f"a prompt of {longest} tokens and a completion of up to {max_new_tokens} exceed the model's context of "
            f"{limit} tokens",
            hint=f"Set `generation.max_new_tokens` to {room} or less." if room > 0 else "Remove that prompt.",
        )


def _cut_at_end(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], end_ids: Sequence[int]) -> Generated:
    """Return the text before the first end token."""
    end = next((place for place, token in enumerate(tokens) if token in end_ids), None)
    own = list(tokens[:end])
    return Generated(decode(tokenizer, own), finished=end is not None, tokens=tuple(own))


def decode(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    """Return the text of tokens with the marks of thoughts, which are special tokens in some vocabularies."""
    special = _special_tokens(tokenizer)
    if not any(is_mark(special[token]) for token in set(tokens) & special.keys()):
        return str(tokenizer.decode(tokens, skip_special_tokens=True))
    kept = kept_tokens(special.values())
    shown = [token for token in tokens if token not in special or special[token] in kept]
    return str(tokenizer.decode(shown, skip_special_tokens=False))


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Return the special tokens of a vocabulary by their ids."""
    added = {token: str(each) for token, each in tokenizer.added_tokens_decoder.items() if each.special}
    return added | dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
