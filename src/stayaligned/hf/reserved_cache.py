"""Keys and values in buffers of their final size: growing by a token copies nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class ReservedLayer(DynamicLayer):
    """A layer of full attention with room for what is still to come."""

    def __init__(self, keys: Tensor, values: Tensor, used: int) -> None:
        """From buffers of (rows, heads, columns, size), of which the first `used` columns are filled."""
        super().__init__()
        self.lazy_initialization(keys, values)
        self._buffers = (keys, values)
        self._show(used)

    def _show(self, used: int) -> None:
        keys, values = self._buffers
        self._used = used
        self.keys, self.values = keys[..., :used, :], values[..., :used, :]

    def get_seq_length(self) -> int:
        """Columns that are filled."""
        return self._used

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new columns behind the old ones; all of them are returned."""
        used = self.get_seq_length()
        end = used + key_states.shape[-2]
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[..., used:end, :] = new
        self._show(end)
        keys, values = self._buffers
        return keys[..., :end, :], values[..., :end, :]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only keep these rows."""
        used = self.get_seq_length()
        keys, values = self._buffers
        self._buffers = (keys[indices], values[indices])
        self._show(used)


class Reserved:
    """The buffers of all layers for a batch, filled piece by piece of its rows and then used as a whole."""

    def __init__(self, first: DynamicCache, rows: int, width: int, room: int) -> None:
        """Room for `rows` prompts that end at column `width` and `room` more columns, beginning with `first`'s rows."""
        held: list[Any] = list(first.layers)
        self._width = width
        self._layers = [
            (_buffer(layer.keys, rows, width, room), _buffer(layer.values, rows, width, room)) for layer in held
        ]

    def piece(self, start: int, rows: int, columns: int) -> DynamicCache:
        """An empty cache that writes into these rows' last `columns` columns before `width`."""
        place = (slice(start, start + rows), slice(None), slice(self._width - columns, self._width))
        return _cache([ReservedLayer(keys[place], values[place], 0) for keys, values in self._layers])

    def whole(self) -> DynamicCache:
        """The cache of all rows."""
        return _cache([ReservedLayer(keys, values, self._width) for keys, values in self._layers])


def _cache(layers: Sequence[ReservedLayer]) -> DynamicCache:
    cache = DynamicCache()
    own: Any = cache
    own.layers, own.layer_class_to_replicate = [*layers], None
    return cache


def _buffer(first: Tensor, rows: int, width: int, room: int) -> Tensor:
    """Zeros (what is masked must still be numbers), and `first` in its place: (rows, heads, columns, size)."""
    whole = first.new_zeros(rows, first.shape[1], width + room, first.shape[3])
    whole[: first.shape[0], :, width - first.shape[2] : width] = first
    return whole
