"""Prompts as token ids to answers as token ids, in batches that a budget of memory bounds. Imports no torch by itself.

A model whose cache is keys and values of full attention is decoded here: rows that have ended leave the batch, and
the steps cost nothing but the model. What else there is (state-space models, sliding windows, hybrids) goes through
transformers' own `generate`.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from torch import Tensor

_log = logging.getLogger(__name__)

_PROBE_TOKENS, _PROBE_PADS, _PROBE_STEPS = 32, 8, 3
"""Tokens of a prompt, of padding before them, and of an answer with which a model is tried."""
_MOST_ROWS = 256
"""A longer batch is no faster anywhere, and is the longer waited for."""
_PREFILL_TOKENS = 2048
"""Tokens, padding included, of one piece of a prefill."""
FIXED_BYTES = 64 << 20
"""What the libraries themselves take while a batch is computed (48 MiB seen)."""
_COMPACT_BELOW = 0.85
"""Rows are copied together once no more than this share of them is left."""
_LOOP_ARGUMENTS = {"input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"}


class Manner(Enum):
    """How a model can be asked."""

    LOOP = "in batches, by the loop of this module"
    HOST = "in batches, by transformers"
    ALONE = "one prompt at a time, by transformers: it takes padding for text"


@dataclass(frozen=True, slots=True)
class Limits:
    """What ends an answer, and what a batch may take."""

    max_new_tokens: int
    end_ids: tuple[int, ...]
    pad_id: int
    temperature: float
    memory_bytes: int


def answers(
    host: Any, prompts: Sequence[list[int]], keys: Sequence[str], limits: Limits
) -> Iterator[tuple[int, list[int]]]:
    """Place among the prompts and the tokens written, the end token included, in the order in which they end.

    Args:
        host: a causal language model of transformers, in evaluation mode, with a bare generation configuration.
        prompts: token ids, none empty.
        keys: what a prompt's samples depend on; without meaning at temperature 0.
        limits: see there.
    """
    manner = manner_of(host, min(prompts, key=len), limits.pad_id) if len(prompts) > 1 else Manner.HOST
    if manner is Manner.ALONE:
        _say_slow(type(host).__name__)
    write = _loop if manner is Manner.LOOP else _by_host
    for rows in _batches(host, [len(ids) for ids in prompts], limits, manner):
        for place, tokens in write(host, [prompts[r] for r in rows], [keys[r] for r in rows], limits):
            yield rows[place], tokens


@cache
def _say_slow(kind: str) -> None:
    _log.warning("%s takes padding for text: it answers one prompt at a time", kind)


# ---- two ways to write ---------------------------------------------------------------------------------------------


def _loop(
    host: Any, prompts: Sequence[list[int]], keys: Sequence[str], limits: Limits
) -> Iterator[tuple[int, list[int]]]:
    """Prefill, then one token a step for the rows that have not ended; each row is given when it ends."""
    import torch

    width = max(map(len, prompts))
    noise = GumbelNoise(keys, limits.temperature) if limits.temperature else None
    # In a buffer of the final width: growing it by a column a step would copy it every time.
    seen = torch.ones(len(prompts), width + limits.max_new_tokens, dtype=torch.long, device=host.device)
    for row, ids in enumerate(prompts):
        seen[row, : width - len(ids)] = 0
    positions = torch.tensor([[len(ids) - 1] for ids in prompts], device=host.device)
    rows: list[int | None] = [*range(len(prompts))]
    """The prompt that each row of the batch answers; None once it has ended."""
    written: list[list[int]] = [[] for _ in prompts]
    with torch.inference_mode():
        states, logits = _prefilled(host, prompts, limits.pad_id, limits.max_new_tokens)
    while True:
        chosen = (logits if noise is None else noise(logits)).argmax(dim=-1)
        for row, token in enumerate(chosen.tolist()):
            prompt = rows[row]
            if prompt is None:
                continue
            written[prompt].append(token)
            if token in limits.end_ids or len(written[prompt]) == limits.max_new_tokens:
                rows[row] = None
                yield prompt, written[prompt]
        kept = [row for row, prompt in enumerate(rows) if prompt is not None]
        if not kept:
            return
        if len(kept) <= _COMPACT_BELOW * len(rows):
            chosen, seen, positions = chosen[kept], seen[kept], positions[kept]
            states.batch_select_indices(torch.tensor(kept, device=host.device))
            rows = [rows[row] for row in kept]
            if noise is not None:
                noise.keep(kept)
        positions, width = positions + 1, width + 1
        with torch.inference_mode():
            logits = _logits(host, chosen[:, None], seen[:, :width], positions, states)


def _logits(host: Any, ids: Tensor, mask: Tensor, positions: Tensor, states: Any) -> Tensor:
    """(batch, vocabulary) logits of the next token; `states` gets those of `ids`."""
    return host(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=states,
        use_cache=True,
        logits_to_keep=1,
    ).logits[:, -1]


def _prefilled(host: Any, prompts: Sequence[list[int]], pad_id: int, room: int) -> tuple[Any, Tensor]:
    """The cache of all prompts, each ending at the same column, with room for answers; and the logits after them.

    In pieces of like length, longest first as they come: a piece's activations are bounded, and little is computed
    for padding.
    """
    import torch
    from transformers import DynamicCache

    from stayaligned.hf.reserved_cache import Reserved

    width = max(map(len, prompts))
    reserved: Reserved | None = None
    logits: list[Tensor] = []
    start = 0
    while start < len(prompts):
        piece = prompts[start : start + max(1, _PREFILL_TOKENS // len(prompts[start]))]
        columns = max(map(len, piece))
        ids, mask = left_padded(piece, pad_id, columns, host.device)
        states = DynamicCache(config=host.config) if reserved is None else reserved.piece(start, len(piece), columns)
        logits.append(_logits(host, ids, mask, (mask.cumsum(dim=1) - 1).clamp(min=0), states))
        if reserved is None:
            reserved = Reserved(states, len(prompts), width, room)
        start += len(piece)
    if reserved is None:
        raise ValueError("no prompts")
    return reserved.whole(), torch.cat(logits)


def _by_host(
    host: Any, prompts: Sequence[list[int]], keys: Sequence[str], limits: Limits
) -> Iterator[tuple[int, list[int]]]:
    """The whole batch by transformers' `generate`, which computes rows that have ended to the end."""
    import torch
    from transformers import LogitsProcessorList

    width = max(map(len, prompts))
    ids, mask = left_padded(prompts, limits.pad_id, width, host.device)
    processors = LogitsProcessorList()
    if limits.temperature:
        noise = GumbelNoise(keys, limits.temperature)
        processors.append(lambda _ids, scores: noise(scores))
    with torch.inference_mode():
        output = host.generate(input_ids=ids, attention_mask=mask, logits_processor=processors)
    for place, tokens in enumerate(output[:, width:].tolist()):
        end = next((n for n, token in enumerate(tokens, start=1) if token in limits.end_ids), len(tokens))
        yield place, tokens[:end]


def left_padded(prompts: Sequence[list[int]], pad_id: int, width: int, device: Any) -> tuple[Tensor, Tensor]:
    """(ids, attention mask), both (prompts, width)."""
    import torch

    ids = torch.tensor([[pad_id] * (width - len(row)) + row for row in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts], device=device)
    return ids, mask


class GumbelNoise:
    """Turns greedy decoding into sampling: argmax(logits/T + g) with g standard Gumbel follows softmax(logits/T).

    Every row has its own generator, on the CPU, so a sample depends neither on the batch nor on the device.
    """

    def __init__(self, keys: Sequence[str], temperature: float) -> None:
        import torch

        self._temperature = temperature
        seeds = [int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") for key in keys]
        self._generators = [torch.Generator().manual_seed(seed >> 1) for seed in seeds]

    def keep(self, rows: Sequence[int]) -> None:
        """Let only these rows remain."""
        self._generators = [self._generators[row] for row in rows]

    def __call__(self, logits: Tensor) -> Tensor:
        """(batch, vocabulary) logits to perturbed logits."""
        import torch

        # Minus the logarithm of an exponential variate is a standard Gumbel one.
        drawn = torch.stack([torch.empty(logits.shape[-1]).exponential_(generator=g) for g in self._generators])
        noise = -drawn.clamp(min=torch.finfo(torch.float32).tiny).log()
        return logits.float() / self._temperature + noise.to(logits.device)


# ---- what fits -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Needs:
    """Bytes that a model takes beside its weights."""

    cache: int
    """A token's keys and values in all layers, and in one more: where a layer's cache is copied, it is there twice."""
    activations: int
    """A token in a prefill, which holds one layer's at a time: queries, keys, values and their rotated copies, the
    gated feed-forward's three, and the residual stream in fp32."""
    logits: int
    """A row's, in fp32, with perturbed ones beside them."""


def needs_of(host: Any) -> Needs:
    """What a model takes, by its configuration."""
    config = host.config.get_text_config()
    size, hidden, layers = host.dtype.itemsize, int(config.hidden_size), int(config.num_hidden_layers)
    heads = int(getattr(config, "num_attention_heads", None) or 1)
    head_size = int(getattr(config, "head_dim", None) or hidden // heads)
    layer_cache = 2 * int(getattr(config, "num_key_value_heads", None) or heads) * head_size * size
    feed_forward = int(getattr(config, "intermediate_size", None) or 4 * hidden)
    return Needs(
        cache=(layers + 1) * layer_cache,
        activations=(4 * heads * head_size + 3 * feed_forward + 2 * hidden) * size + 3 * hidden * 4 + 2 * layer_cache,
        logits=int(config.vocab_size) * 4 * 3,
    )


def _batches(host: Any, lengths: Sequence[int], limits: Limits, manner: Manner) -> Iterator[list[int]]:
    """Row numbers in batches within the budget, the longest prompts first: if memory is short, at once."""
    needs = needs_of(host)
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    while order:
        longest = lengths[order[0]]
        # The mask of a prefill is a square.
        row_bytes = (longest + limits.max_new_tokens) * needs.cache + longest**2 + needs.logits
        once = FIXED_BYTES
        if manner is Manner.LOOP:
            once += max(_PREFILL_TOKENS, longest) * needs.activations
        else:
            row_bytes += longest * needs.activations
        fits = min(_MOST_ROWS, max(1, (limits.memory_bytes - once) // row_bytes))
        yield order[: 1 if manner is Manner.ALONE else fits]
        order = order[1 if manner is Manner.ALONE else fits :]


# ---- which way a model can go --------------------------------------------------------------------------------------

_manners: WeakKeyDictionary[Any, Manner] = WeakKeyDictionary()


def manner_of(host: Any, prompt: list[int], pad_id: int) -> Manner:
    """How a model can be asked, by trial: once for each model in memory, with one of its prompts."""
    import torch

    if host not in _manners:
        tried = prompt[-_PROBE_TOKENS:]
        with torch.no_grad():
            together = _pads_are_ignored(host, tried, pad_id)
            loops = together and _loop_agrees(host, tried, pad_id)
        _manners[host] = Manner.LOOP if loops else Manner.HOST if together else Manner.ALONE
    return _manners[host]


def _loop_agrees(host: Any, prompt: list[int], pad_id: int) -> bool:
    """Whether the model's cache is plain keys and values, and the loop's logits are those of `generate`."""
    import torch
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    if not inspect.signature(host.forward).parameters.keys() >= _LOOP_ARGUMENTS:
        return False
    states = DynamicCache(config=host.config)
    if any(type(layer) is not DynamicLayer for layer in states.layers):
        return False
    padded, mask = left_padded([prompt], pad_id, len(prompt) + _PROBE_PADS, host.device)
    expected = host.generate(
        input_ids=padded,
        attention_mask=mask,
        max_new_tokens=_PROBE_STEPS,
        min_new_tokens=_PROBE_STEPS,
        return_dict_in_generate=True,
        output_logits=True,
    )
    ids, positions = padded, (mask.cumsum(dim=1) - 1).clamp(min=0)
    for step, logits in enumerate(expected.logits):
        found = _logits(host, ids, mask, positions, states)
        if not all(type(layer) is DynamicLayer and layer.is_initialized for layer in states.layers):
            return False
        if states.get_seq_length() != mask.shape[1]:
            return False
        if not torch.allclose(found.float(), logits, rtol=0, atol=_rounding(host, logits)):
            return False
        ids, positions = expected.sequences[:, padded.shape[1] + step, None], positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(1, 1)], dim=1)
    return True


def _rounding(host: Any, logits: Tensor) -> float:
    """Half of the digits of a model's numbers."""
    import torch

    return torch.finfo(host.dtype).eps ** 0.5 * float(logits.abs().max())


def _pads_are_ignored(host: Any, prompt: list[int], pad_id: int) -> bool:
    """Whether the next token is the same with padding before the prompt; a short prompt feels it most.

    No gradient may reach the embeddings of the padding (exactly none: what is masked is multiplied by 0), and the
    logits must agree with those of the prompt alone, up to half of their digits. The first finds a state that takes
    the padding in, however little; the second one that starts from something else, such as a bias.
    """
    import torch

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
    return bool((alone - beside).abs().max() <= _rounding(host, alone))
