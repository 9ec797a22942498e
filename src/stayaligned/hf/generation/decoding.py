"""Many answers at once by the model's own forward: slots of one preallocated cache, refilled as answers end."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from transformers import DynamicCache, GenerationMixin
from transformers.cache_utils import DynamicLayer

from stayaligned.hf.generation import memory

if TYPE_CHECKING:
    from torch import Tensor

_PASSED = frozenset({"input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"})


def has_plain_cache(host: Any) -> bool:
    """Whether keys and values of full attention are all that a model remembers, and it is asked as others are.

    Sliding windows, states and convolutions keep something else, and a model that prepares its own inputs may count
    positions in its own way: those are left to transformers.
    """
    kind, usual = type(host), vars(GenerationMixin)
    names = "generate", "prepare_inputs_for_generation", "_prepare_cache_for_generation"
    if any(getattr(kind, name) is not usual[name] for name in names):
        return False
    if not kind._supports_default_dynamic_cache() or host.config.is_encoder_decoder:
        return False
    if not inspect.signature(kind.forward).parameters.keys() >= _PASSED:
        return False
    layers = DynamicCache(config=host.config).layers
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


class _Slots(DynamicLayer):
    """One layer's keys and values, (slots, heads, columns, size), of which the first rows and columns are in use.

    All rows are written at one column; a shorter one begins further right, and a mask hides what stands before it.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, slots: int, columns: int) -> None:
        super().__init__()
        self._shape = slots, columns
        self.rows = self.written = 0

    def put(self, keys: Tensor, values: Tensor) -> None:
        """Take new rows in, that end where the others do."""
        if not self.is_initialized:
            slots, columns = self._shape
            # Zeros, since a masked value is multiplied by 0, and what memory happens to hold may not be finite.
            self.keys = keys.new_zeros(slots, keys.shape[1], columns, keys.shape[3])
            self.values = values.new_zeros(slots, values.shape[1], columns, values.shape[3])
            self.is_initialized = True
        taken = slice(self.rows, self.rows + len(keys)), slice(None), slice(self.written - keys.shape[2], self.written)
        self.keys[taken], self.values[taken] = keys, values
        self.rows += len(keys)

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write one column."""
        self.keys[: self.rows, :, self.written] = key_states[:, :, 0]
        self.values[: self.rows, :, self.written] = value_states[:, :, 0]
        self.written += 1
        return self.keys[: self.rows, :, : self.written], self.values[: self.rows, :, : self.written]

    def get_seq_length(self) -> int:
        """Columns in use."""
        return self.written

    def move(self, sources: list[int], targets: list[int], rows: int) -> None:
        """Copy rows over ended ones; `rows` remain."""
        if sources:
            self.keys[targets], self.values[targets] = self.keys[sources], self.values[sources]
        self.rows = rows

    def shift(self, columns: int) -> None:
        """Drop columns on the left."""
        for held in (self.keys, self.values):
            held[: self.rows, :, : self.written - columns] = held[: self.rows, :, columns : self.written].clone()
        self.written -= columns


def decode(
    host: Any,
    prompts: Sequence[Sequence[int]],
    budget: int,
    *,
    max_new_tokens: int,
    end_ids: Sequence[int],
    pad_id: int,
    choose: Callable[[Sequence[int], Tensor], Tensor],
) -> Iterator[tuple[int, list[int]]]:
    """Each prompt's number and the tokens written after it, the end token included, as they end; the longest begin.

    Args:
        host: a model with a plain cache, see `has_plain_cache`.
        prompts: token ids; none is empty.
        budget: bytes beside the weights, see `stayaligned.hf.generation.memory`.
        max_new_tokens: where an answer is cut.
        end_ids: tokens that end one.
        pad_id: stands before shorter prompts, masked.
        choose: next tokens by prompts' numbers and their logits, (prompts, vocabulary).
    """
    waiting = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
    if not waiting:
        return
    width = len(prompts[waiting[0]])
    columns = width + max_new_tokens + max_new_tokens // 2  # some to spare, so that shifting is rare
    plan = memory.plan(host, budget, width, columns)
    pool = _Pool(host, prompts, min(plan.slots, len(prompts)), columns, pad_id, choose)
    ends = frozenset(end_ids)
    while waiting or pool.live:
        # A prompt read alone costs as much as several: wait until some slots are free.
        while waiting and (pool.free >= max(1, pool.slots // 4) or not pool.live):
            fits = max(1, min(pool.free, plan.prefill_tokens // len(prompts[waiting[0]])))
            pool.read(waiting[:fits])
            waiting = waiting[fits:]
            yield from pool.take_ended(ends, max_new_tokens)
        if pool.live:
            pool.step()
            yield from pool.take_ended(ends, max_new_tokens)


class _Pool:
    """The answers that are being written."""

    def __init__(
        self,
        host: Any,
        prompts: Sequence[Sequence[int]],
        slots: int,
        columns: int,
        pad_id: int,
        choose: Callable[[Sequence[int], Tensor], Tensor],
    ) -> None:
        import torch

        self._host, self._prompts, self._pad_id, self._choose = host, prompts, pad_id, choose
        self.slots, self._columns = slots, columns
        self._cache: Any = DynamicCache(config=host.config)
        self._layers = [_Slots(slots, columns) for _ in self._cache.layers]
        self._cache.layers = list(self._layers)
        self._mask = torch.zeros(slots, columns, dtype=torch.long, device=host.device)
        self.live: list[int] = []
        """The prompts' numbers, by slot."""
        self._written: list[list[int]] = []

    @property
    def free(self) -> int:
        """Slots without an answer."""
        return self.slots - len(self.live)

    def read(self, rows: Sequence[int]) -> None:
        """Read prompts into free slots and write the first token after each."""
        asked = [self._prompts[row] for row in rows]
        width = max(map(len, asked))
        if not self.live:
            self._set_column(width)
        column = self._layers[0].written
        if column < width:
            raise AssertionError("prompts are read by length, the longest first")
        ids, mask = left_padded(asked, self._pad_id, width, self._host.device)
        cache: Any = DynamicCache(config=self._host.config)
        logits = self._ask(ids, mask, (mask.cumsum(-1) - 1).clamp(min=0), cache)
        taken = slice(len(self.live), len(self.live) + len(rows))
        self._mask[taken] = 0
        self._mask[taken, column - width : column] = mask
        for own, read in zip(self._layers, cache.layers, strict=True):
            own.put(read.keys, read.values)
            read.keys = read.values = None  # one layer at a time is held twice
        self.live += rows
        self._written += [[token] for token in self._choose(rows, logits).tolist()]

    def step(self) -> None:
        """Write one more token of every answer."""
        import torch

        if self._layers[0].written == self._columns:
            self._shift()
        column, count = self._layers[0].written, len(self.live)
        self._mask[:count, column] = 1
        places = [
            len(self._prompts[row]) + len(written) - 1 for row, written in zip(self.live, self._written, strict=True)
        ]
        device = self._host.device
        ids = torch.tensor([[written[-1]] for written in self._written], device=device)
        positions = torch.tensor(places, device=device)[:, None]
        logits = self._ask(ids, self._mask[:count, : column + 1], positions, self._cache)
        for written, token in zip(self._written, self._choose(self.live, logits).tolist(), strict=True):
            written.append(token)

    def take_ended(self, ends: frozenset[int], limit: int) -> Iterator[tuple[int, list[int]]]:
        """Answers that have ended; the last ones that go on take their slots."""
        over = [len(written) >= limit or written[-1] in ends for written in self._written]
        if not any(over):
            return
        ended = [(self.live[slot], self._written[slot]) for slot, done in enumerate(over) if done]
        count = len(over) - len(ended)
        targets = [slot for slot in range(count) if over[slot]]
        sources = [slot for slot in range(count, len(over)) if not over[slot]]
        for target, source in zip(targets, sources, strict=True):
            self.live[target], self._written[target] = self.live[source], self._written[source]
        del self.live[count:], self._written[count:]
        for layer in self._layers:
            layer.move(sources, targets, count)
        if sources:
            self._mask[targets] = self._mask[sources]
        yield from ended

    def _ask(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
        """Logits after the last token of each row, (rows, vocabulary)."""
        return self._host(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]

    def _set_column(self, column: int) -> None:
        for layer in self._layers:
            layer.written = column

    def _shift(self) -> None:
        """Drop the columns on the left that no answer uses any more."""
        longest = max(
            len(self._prompts[row]) + len(written) - 1 for row, written in zip(self.live, self._written, strict=True)
        )
        unused = self._layers[0].written - longest
        for layer in self._layers:
            layer.shift(unused)
        self._mask[:, : self._columns - unused] = self._mask[:, unused:].clone()
        self._mask[:, self._columns - unused :] = 0


def left_padded(prompts: Sequence[Sequence[int]], pad_id: int, width: int, device: Any) -> tuple[Tensor, Tensor]:
    """(ids, attention mask), both (prompts, width)."""
    import torch

    ids = torch.tensor([[pad_id] * (width - len(row)) + list(row) for row in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts], device=device)
    return ids, mask
