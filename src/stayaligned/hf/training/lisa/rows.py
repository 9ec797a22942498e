"""The rows of each optimizer step: the user's rows and the alignment rows in one order, by index or as a stream."""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Sampler

from stayaligned.algorithms.lisa import RowStream, row_indices_at
from stayaligned.algorithms.lisa_schedule import BiStateSchedule, Phase
from stayaligned.core.errors import StayalignedError
from stayaligned.hf.features import IGNORED
from stayaligned.hf.quiet import bars_off

if TYPE_CHECKING:
    from transformers import Trainer

ALIGNMENT_ROW = "alignment_row"
"""The only key of a row that is collated by another trainer."""
_DIGEST_ROWS = 64


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
        return ConcatDataset([self.finetuning, self.alignment])

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


def prepare_alignment_dataset(trainer: Trainer, dataset: Any) -> Any:
    """Prepare the alignment rows like the trainer's own rows; TRL's SFTTrainer tokenizes them itself.

    Raises:
        StayalignedError: if there are no rows, fewer than a batch, only rows without labels to learn, or rows of
            another form than the user's.
    """
    if dataset is None:
        raise StayalignedError(
            "alignment_dataset is missing, but alignment_steps is not 0",
            hint="Pass alignment rows, or set alignment_steps=0 for the proximal term alone.",
        )
    if isinstance(dataset, Sized) and len(dataset) == 0:
        raise StayalignedError("alignment_dataset is empty", hint="Pass a dataset with alignment rows.")
    if not isinstance(dataset, Sized) and not isinstance(dataset, Iterable):
        raise StayalignedError(
            f"alignment_dataset is of type {type(dataset).__name__}, which is not a dataset",
            hint="Pass a list of rows, a dataset or a stream.",
        )
    prepared = _prepare_by_trl(trainer, dataset)
    if isinstance(prepared, Sized):
        _require_usable(trainer, prepared)
    return prepared


def _prepare_by_trl(trainer: Trainer, dataset: Any) -> Any:
    # Importing TRL takes seconds; if the trainer is one of TRL's, the module has been imported.
    sft = sys.modules.get("trl.trainer.sft_trainer")
    if sft is None or not isinstance(trainer, sft.SFTTrainer):
        of_trl = [c.__name__ for c in type(trainer).__mro__ if c.__module__.startswith("trl.")]
        if of_trl:
            raise StayalignedError(
                f"{of_trl[0]} prepares its rows in its own way, which is not supported",
                hint="Pass a trainer that prepares the alignment rows, alignment_trainer=lambda model: …, or train the "
                "user's rows with transformers.Trainer or TRL's SFTTrainer.",
            )
        return dataset
    host: Any = trainer
    if host._is_vision_dataset:
        raise StayalignedError("the user's rows have images, which is not supported", hint="Drop the image columns.")
    if host._skip_prepare_dataset:
        return dataset
    # TRL decides once, from the user's first row, whether prompts are masked. The alignment rows may differ.
    chosen: bool = host.completion_only_loss
    if host.args.completion_only_loss is None:
        sample = next(iter(dataset))
        host.completion_only_loss = "prompt" in sample and "completion" in sample
    try:
        with bars_off(bool(host.args.disable_tqdm)):
            prepared = host._prepare_dataset(
                dataset, host.processing_class, host.args, host.args.packing, None, "alignment"
            )
    finally:
        host.completion_only_loss = chosen
    if isinstance(prepared, Sized) and len(prepared) == 0:
        raise StayalignedError(
            f"no alignment row has a completion within max_length={host.args.max_length} tokens",
            hint="Raise max_length, or pass shorter rows.",
        )
    return prepared


def _require_usable(trainer: Trainer, prepared: Any) -> None:
    user = trainer.train_dataset
    batch = trainer.args.per_device_train_batch_size * max(trainer.args.world_size, 1)
    if len(prepared) < batch:
        raise StayalignedError(
            f"alignment_dataset has {len(prepared)} rows, fewer than a batch of {batch}, so a batch would repeat rows",
            hint="Pass more alignment rows, or lower per_device_train_batch_size.",
        )
    sample, user_sample = prepared[0], user[0] if isinstance(user, Sized) and len(user) else None  # pyright: ignore
    if isinstance(sample, Mapping) and isinstance(user_sample, Mapping):
        needed = {"input_ids", "labels"} & user_sample.keys()
        if missing := sorted(needed - sample.keys()):
            raise StayalignedError(
                f"the alignment rows lack {' and '.join(missing)}, which the user's rows have; "
                f"they have {', '.join(sorted(map(str, sample)))}",
                hint="Prepare both datasets in the same way: features for transformers.Trainer, text for SFTTrainer.",
            )
    for name, rows in (("train_dataset", user), ("alignment_dataset", prepared)):
        if isinstance(rows, Sized) and not any(_has_label(rows[i]) for i in range(len(rows))):  # pyright: ignore
            raise StayalignedError(
                f"every label of {name} is masked ({IGNORED}), so there is nothing to learn",
                hint="Set `labels` to the completions' tokens, or raise the length at which rows are cut.",
            )


def _has_label(row: Any) -> bool:
    """Return whether a row has an unmasked label, or no `labels`, which the collator then creates."""
    if not isinstance(row, Mapping) or "labels" not in row:
        return True
    labels = row["labels"]
    return any(label != IGNORED for label in (labels.tolist() if isinstance(labels, Tensor) else labels))


def _plain(value: Any) -> Any:
    """Convert a row to JSON values; a value without a JSON form is replaced by the name of its type."""
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else type(value).__name__
