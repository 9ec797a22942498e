"""The rows of each optimizer step: the user's rows and the alignment rows in one order, by index or as a stream."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Sampler

from stayaligned.algorithms.lisa import RowStream, row_indices_at
from stayaligned.algorithms.lisa_schedule import BiStateSchedule, Phase
from stayaligned.core.errors import StayalignedError

ALIGNMENT_ROW = "alignment_row"
"""The only key of a row that is collated by another trainer."""
_DIGEST_ROWS = 64


class _JoinedRows(ConcatDataset[Any]):
    """The user's rows, followed by the alignment rows."""

    column_names: None = None
    """What axolotl's trainer reads of its rows, to drop columns that it has added; there are none to drop."""


@dataclass(frozen=True)
class RowSources:
    """The two sources of rows of one run.

    A source with a length is shuffled by index; a stream is read in its own order.
    """

    finetuning: Any
    alignment: Any
    """The alignment rows; None if no step takes any."""
    seed: int

    @property
    def streamed(self) -> bool:
        """Whether a source has no length, so that the host must train on a stream."""
        return not all(isinstance(source, Sized) for source in (self.finetuning, self.alignment) if source is not None)

    def count(self, phase: Phase) -> int | None:
        """Return the number of rows of a source; None for a stream."""
        source = self._source(phase)
        if source is None:
            return 0
        return len(source) if isinstance(source, Sized) else None

    def shuffled(self, phase: Phase) -> RowStream:
        """Return the order in which the rows of a source with a length are drawn."""
        return RowStream(self.count(phase) or 0, self.seed, str(phase))

    def _source(self, phase: Phase) -> Any:
        return self.alignment if phase is Phase.ALIGNMENT else self.finetuning

    def dataset(self, schedule: Callable[[], BiStateSchedule], rows_per_step: Callable[[], int]) -> Any:
        """Return the host's training set: both sources behind one index, or one endless stream in schedule order."""
        if self.alignment is None:
            return self.finetuning
        if self.streamed:
            return _ScheduledStream(self, schedule, rows_per_step)
        return _JoinedRows([self.finetuning, self.alignment])

    def iterate(self, phase: Phase) -> Iterator[Any]:
        """Yield the rows of one source endlessly, one pass after the other."""
        source: Any = self._source(phase)
        if self.count(phase) is not None:
            order = self.shuffled(phase)
            for at in itertools.count():
                yield source[order.take(at, 1)[0]]
        for passes in itertools.count():
            if callable(reshuffle := getattr(source, "set_epoch", None)):
                reshuffle(passes)
            row = None
            for row in source:
                yield row
            if row is None:
                raise StayalignedError(f"the stream of {phase} rows is empty", hint="Check its source and filters.")

    def digest(self, phase: Phase) -> str | None:
        """Return a fingerprint of a source's length and of rows spread evenly over it.

        None for a stream, and for a source whose rows change at every access. The random state is unchanged.
        """
        source, count = self._source(phase), self.count(phase)
        if not count:
            return None
        with torch.random.fork_rng():
            if _plain(source[0]) != _plain(source[0]):
                return None
            return self._digest(source, count)

    @staticmethod
    def _digest(source: Any, count: int) -> str:
        sampled = sorted({index * (count - 1) // max(_DIGEST_ROWS - 1, 1) for index in range(_DIGEST_ROWS)})
        content = [_plain(source[index]) for index in sampled]
        return hashlib.sha256(json.dumps([count, content], sort_keys=True).encode()).hexdigest()[:16]


class BiStateSampler(Sampler[int]):
    """A sampler of one epoch: the rows of all its optimizer steps, also if it is read in the middle of the epoch."""

    def __init__(
        self,
        rows: RowSources,
        schedule: Callable[[], BiStateSchedule],
        rows_per_step: Callable[[], int],
        steps_per_epoch: Callable[[], int],
        step: Callable[[], int],
    ) -> None:
        self._rows, self._schedule, self._step = rows, schedule, step
        self._rows_per_step, self._steps_per_epoch = rows_per_step, steps_per_epoch

    def __len__(self) -> int:
        return self._steps_per_epoch() * self._rows_per_step()

    def __iter__(self) -> Iterator[int]:
        steps, schedule = self._steps_per_epoch(), self._schedule()
        finetuning, alignment = (self._rows.shuffled(phase) for phase in (Phase.FINETUNING, Phase.ALIGNMENT))
        # On resume the host skips the completed batches of the epoch, so the sampler starts at the epoch's first step.
        start = self._step() // steps * steps
        for step in range(start, start + steps):
            yield from row_indices_at(
                step, schedule, rows_per_step=self._rows_per_step(), finetuning=finetuning, alignment=alignment
            )


class _ScheduledStream(IterableDataset[Any]):
    """Both sources as one endless stream, one optimizer step after the other, always from step 0.

    The host does not store a position in a stream; on resume it skips the rows of the completed steps.
    """

    def __init__(
        self, rows: RowSources, schedule: Callable[[], BiStateSchedule], rows_per_step: Callable[[], int]
    ) -> None:
        self._rows, self._schedule, self._rows_per_step = rows, schedule, rows_per_step

    def __iter__(self) -> Iterator[Any]:
        schedule, sources = self._schedule(), {phase: self._rows.iterate(phase) for phase in Phase}
        for step in itertools.count():
            yield from itertools.islice(sources[schedule.phase_at(step)], self._rows_per_step())


class WrappedRows(Dataset[Any]):
    """Rows under one key, by which the collator recognizes the rows of another trainer."""

    def __init__(self, rows: Any) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {ALIGNMENT_ROW: self._rows[index]}


@dataclass(frozen=True)
class PhaseCollator:
    """A collator that passes the user's rows to the host's collator, and wrapped rows to that of their trainer."""

    finetuning: Callable[[list[Any]], Any]
    alignment: Callable[[list[Any]], Any]

    def __call__(self, rows: list[Any]) -> Any:
        """Collate a batch, whose rows are all of one phase."""
        if ALIGNMENT_ROW in rows[0]:
            return self.alignment([row[ALIGNMENT_ROW] for row in rows])
        return self.finetuning(rows)


def _plain(value: Any) -> Any:
    """Convert a row to JSON values; a value without a JSON form is replaced by the name of its type."""
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else type(value).__name__
