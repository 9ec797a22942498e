"""How many answers fit into so many bytes: of keys and values, and of what reading and writing take on the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_READING_SHARE = 4
"""1 in so many bytes is for the prompts that are being read; the rest is for the answers that are being written."""
_ALLOCATOR_SHARE = 8
"""1 in so many bytes is left to the allocator, which does not give back all that it took."""
_MOST_READ = 2048
"""Tokens that are read at once at most: more of them make it no faster."""


@dataclass(frozen=True, slots=True)
class Costs:
    """Bytes, by a model's configuration and the type of its weights."""

    cached_token: int
    """Keys and values of all layers."""
    layer_token: int
    """Keys and values of one layer for every query head: attention may copy them to that."""
    computed_token: int
    """What one layer holds of a token while it computes."""
    heads: int
    logits: int
    """A row's next-token scores, and their copies when noise is added."""

    @classmethod
    def of(cls, host: Any) -> Costs:
        """The costs of a transformers model; of one with a state instead of a cache, more than it takes."""
        config = host.config.get_text_config()
        size = host.dtype.itemsize

        def number(name: str, default: int) -> int:
            value = getattr(config, name, None)
            if isinstance(value, list | tuple):  # one for each layer
                value = max((each for each in value if isinstance(each, int)), default=None)
            return value if isinstance(value, int) and value > 0 else default

        hidden = number("hidden_size", 1024)
        heads = number("num_attention_heads", 1)
        per_head = number("head_dim", max(1, hidden // heads))
        keys = max(per_head, number("qk_nope_head_dim", 0) + number("qk_rope_head_dim", 0))
        values = max(per_head, number("v_head_dim", 0))
        layers = number("num_hidden_layers", 32)
        wide = max(number("intermediate_size", 4 * hidden), number("moe_intermediate_size", 0))
        wide *= number("num_experts_per_tok", 1)
        vocabulary = host.get_output_embeddings().weight.shape[0]
        return cls(
            cached_token=layers * number("num_key_value_heads", heads) * (keys + values) * size,
            layer_token=heads * (keys + values) * size,
            computed_token=(8 * hidden + 4 * wide + 4 * heads * keys) * size,
            heads=heads,
            logits=vocabulary * (2 * size + 24),
        )

    def read_token(self, width: int, *, scores: bool) -> int:
        """Of a token of a prompt that is read among others, all padded to `width`.

        Args:
            width: tokens.
            scores: whether attention keeps a score for each pair of tokens, as the eager one does, or a mask alone.
        """
        pairs = width * (self.heads * 12 if scores else 24)
        return self.cached_token + self.layer_token + self.computed_token + pairs

    def written_row(self, columns: int) -> int:
        """Of an answer that is being written, in a cache of so many columns."""
        return columns * (self.cached_token + 2 * self.layer_token + 24) + self.computed_token + self.logits


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is held at once."""

    slots: int
    """Answers that are written at once."""
    prefill_tokens: int
    """Tokens, padding included, of the prompts that are read at once; one prompt in any case."""


def plan(host: Any, budget: int, width: int, columns: int) -> Plan:
    """What fits into `budget` bytes beside the weights, if the longest prompt has `width` tokens; one row in any case.

    Args:
        host: the model.
        budget: bytes.
        width: tokens of the longest prompt.
        columns: tokens of a row of the cache.
    """
    costs = Costs.of(host)
    budget -= budget // _ALLOCATOR_SHARE
    reading = budget // _READING_SHARE
    tokens = reading // costs.read_token(width, scores=_keeps_scores(host))
    return Plan(max(1, (budget - reading) // costs.written_row(columns)), max(1, min(tokens, _MOST_READ)))


def rows_at_once(host: Any, budget: int, width: int, max_new_tokens: int) -> int:
    """Rows that transformers' own loop may be given: it reads all of them at once, and grows its cache by copying."""
    costs = Costs.of(host)
    budget -= budget // _ALLOCATOR_SHARE
    read = width * (costs.read_token(width, scores=_keeps_scores(host)) - costs.cached_token)
    return max(1, budget // (read + costs.written_row(width + max_new_tokens)))


def _keeps_scores(host: Any) -> bool:
    kind: Sequence[str] | None = getattr(host.config, "_attn_implementation", None)
    return kind not in ("sdpa", "flash_attention_2", "flash_attention_3")
