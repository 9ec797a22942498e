"""Batches of prompts: sorted by length, left-padded, and as large as the memory budget allows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

_ALLOCATOR_SHARE = 8
"""One eighth of the budget is reserved for the allocator, which does not return all freed memory."""
_PADDING_PER_NEW_TOKEN = 64
"""Tokens of padding, per generated token, above which a further batch is faster than more padding: a decoding step
costs about as much as reading 20 (135M parameters, CPU) to 200 (0.7M) prompt tokens."""


def split_by_size(lengths: Sequence[int], rows: Sequence[int], size: int) -> list[Sequence[int]]:
    """Split row numbers into batches of similar lengths, the longest first so that a lack of memory shows at once."""
    ordered = sorted(rows, key=lambda row: -lengths[row])
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


def split_by_memory(host: Any, lengths: Sequence[int], memory: int, max_new_tokens: int) -> Iterator[list[int]]:
    """Yield row numbers in batches that fit into the memory budget, the longest prompts first.

    A batch also ends where padding its shorter prompts would cost more time than another batch.

    Args:
        host: the transformers model that generates.
        lengths: tokens of each prompt.
        memory: bytes beside the weights; a batch has at least one row, whatever the budget.
        max_new_tokens: largest number of tokens generated per row.
    """
    most_padding = _PADDING_PER_NEW_TOKEN * max_new_tokens
    batch: list[int] = []
    rows, padding = 0, 0
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        padding += lengths[batch[0]] - lengths[row] if batch else 0
        if batch and (len(batch) >= rows or padding > most_padding):
            yield batch
            batch, padding = [], 0
        if not batch:
            rows = rows_in_memory(host, memory, lengths[row], max_new_tokens)
        batch.append(row)
    if batch:
        yield batch


def rows_in_memory(host: Any, memory: int, width: int, max_new_tokens: int) -> int:
    """Return how many rows of `width` prompt tokens may be generated in `memory` bytes; at least one."""
    return max(1, (memory - memory // _ALLOCATOR_SHARE) // bytes_per_row(host, width, max_new_tokens))


def bytes_per_row(host: Any, width: int, max_new_tokens: int) -> int:
    """Estimate the memory that one row of a batch takes at its peak, from the model's configuration and type.

    Counted are the cache of keys and values (twice, because it is copied when it grows and when rows leave the batch),
    what one layer computes while the prompt is read (activations, attention scores or their mask, keys and values
    repeated for every query head), and the logits of one token. A model that keeps a state instead of a cache takes
    less.
    """
    config = host.config.get_text_config()
    size = host.dtype.itemsize

    def number(name: str, default: int) -> int:
        value = getattr(config, name, None)
        if isinstance(value, list | tuple):  # one per layer
            value = max((each for each in value if isinstance(each, int)), default=None)
        return value if isinstance(value, int) and value > 0 else default

    hidden = number("hidden_size", 1024)
    heads = number("num_attention_heads", 1)
    head_size = number("head_dim", max(1, hidden // heads))
    key_size = max(head_size, number("qk_nope_head_dim", 0) + number("qk_rope_head_dim", 0))
    key_and_value = (key_size + max(head_size, number("v_head_dim", 0))) * size
    inner = max(number("intermediate_size", 4 * hidden), number("moe_intermediate_size", 0))
    inner *= number("num_experts_per_tok", 1)

    cached = number("num_hidden_layers", 32) * number("num_key_value_heads", heads) * key_and_value
    repeated = 2 * heads * key_and_value
    activations = (8 * hidden + 4 * inner + 4 * heads * key_size) * size
    pair = 24 if _is_fused(host) else 12 * heads
    logits = host.get_output_embeddings().weight.shape[0] * (2 * size + 24)
    return (width + max_new_tokens) * (2 * cached + repeated) + width * (activations + width * pair) + logits


def _is_fused(host: Any) -> bool:
    """Return whether attention keeps no score for each pair of tokens."""
    return getattr(host.config, "_attn_implementation", None) in {"sdpa", "flash_attention_2", "flash_attention_3"}


def pad_left(prompts: Sequence[Sequence[int]], pad_id: int, width: int, device: Any) -> tuple[Tensor, Tensor]:
    """Return token ids and attention mask, both (prompts, width)."""
    import torch

    ids = torch.tensor([[pad_id] * (width - len(row)) + list(row) for row in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts], device=device)
    return ids, mask
