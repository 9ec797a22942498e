"""Which rows each optimizer step draws: the user's and the alignment rows in one order, by index or as a stream."""

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

from stayaligned.algorithms.lisa import BiStateSchedule, Phase, RowStream
from stayaligned.core.errors import StayalignedError
from stayaligned.hf.features import IGNORED
from stayaligned.hf.quiet import bars_off

if TYPE_CHECKING:
    from transformers import Trainer

ALIGNMENT_ROW = "alignment_row"
"""The one key of a row that another trainer's collator takes."""
_DIGEST_ROWS = 64


@dataclass(frozen=True)
class Rows:
    """The two sources of one run. A source with a length is shuffled by index; a stream is read in its own order."""

    finetuning: Any
    alignment: Any
    """None, where no step takes alignment rows."""
    seed: int

    @property
    def streamed(self) -> bool:
        """Whether a source has no length, so that the host must be given a stream."""
        return not all(isinstance(source, Sized) for source in (self.finetuning, self.alignment) if source is not None)

    def count(self, phase: Phase) -> int | None:
        """How many rows a source holds; None of a stream."""
        source = self._source(phase)
        if source is None:
            return 0
        return len(source) if isinstance(source, Sized) else None

    def shuffled(self, phase: Phase) -> RowStream:
        """The order in which the rows of a source with a length are drawn."""
        return RowStream(self.count(phase) or 0, self.seed, str(phase))

    def _source(self, phase: Phase) -> Any:
        return self.alignment if phase is Phase.ALIGNMENT else self.finetuning

    def dataset(self, schedule: Callable[[], BiStateSchedule], rows_per_step: Callable[[], int]) -> Any:
        """What the host trains on: both sources behind one index, or one endless stream in the schedule's order."""
        if self.alignment is None:
            return self.finetuning
        if self.streamed:
            return _ScheduledStream(self, schedule, rows_per_step)
        return ConcatDataset([self.finetuning, self.alignment])

    def iterate(self, phase: Phase) -> Iterator[Any]:
        """The rows of one source for ever, pass after pass."""
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
                raise StayalignedError(f"the stream of {phase} rows holds none", hint="Check its source and filters.")

    def digest(self, phase: Phase) -> str | None:
        """A fingerprint of a source's length and of rows spread over it.

        None of a stream, and of rows that are drawn anew whenever they are asked for. No random number is used up.
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
    """The rows of one epoch: those of the optimizer steps from the epoch's first, whatever step it is read at."""

    def __init__(
        self,
        rows: Rows,
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
        # On resume the host skips the batches of the epoch that are done, so the epoch is given from its start.
        start = self._step() // steps * steps
        for step in range(start, start + steps):
            yield from schedule.indices_at(
                step, rows_per_step=self._rows_per_step(), finetuning=finetuning, alignment=alignment
            )


class _ScheduledStream(IterableDataset[Any]):
    """Both sources as one endless stream, a whole optimizer step after the other; always from step 0.

    The host, which knows no position in a stream, skips what a resumed run has done.
    """

    def __init__(self, rows: Rows, schedule: Callable[[], BiStateSchedule], rows_per_step: Callable[[], int]) -> None:
        self._rows, self._schedule, self._rows_per_step = rows, schedule, rows_per_step

    def __iter__(self) -> Iterator[Any]:
        schedule, sources = self._schedule(), {phase: self._rows.iterate(phase) for phase in Phase}
        for step in itertools.count():
            yield from itertools.islice(sources[schedule.phase_at(step)], self._rows_per_step())


class Wrapped(Dataset[Any]):
    """Rows under one key, which tells the collator whose they are."""

    def __init__(self, rows: Any) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {ALIGNMENT_ROW: self._rows[index]}


@dataclass(frozen=True)
class PhaseCollator:
    """Makes a batch of the user's rows in the host's way, and of wrapped ones in the way of the trainer they are of."""

    finetuning: Callable[[list[Any]], Any]
    alignment: Callable[[list[Any]], Any]

    def __call__(self, rows: list[Any]) -> Any:
        """A batch holds rows of one state only."""
        if ALIGNMENT_ROW in rows[0]:
            return self.alignment([row[ALIGNMENT_ROW] for row in rows])
        return self.finetuning(rows)


def prepare_alignment_dataset(trainer: Trainer, dataset: Any) -> Any:
    """The alignment rows as the trainer's own rows are: for TRL's SFTTrainer tokenized by its own preparation.

    Raises:
        StayalignedError: if there are none, too few for a batch, none with anything to learn, or of another form.
    """
    if dataset is None:
        raise StayalignedError(
            "no alignment_dataset given, but alignment_steps is not 0",
            hint="Give safety rows, or alignment_steps=0 for the pull alone.",
        )
    if isinstance(dataset, Sized) and len(dataset) == 0:
        raise StayalignedError("alignment_dataset is empty", hint="Give a dataset with safety rows.")
    if not isinstance(dataset, Sized) and not isinstance(dataset, Iterable):
        raise StayalignedError(
            f"alignment_dataset is {type(dataset).__name__}, no dataset", hint="Give rows, a dataset or a stream."
        )
    prepared = _prepared_by_trl(trainer, dataset)
    if isinstance(prepared, Sized):
        _refuse_unusable(trainer, prepared)
    return prepared


def _prepared_by_trl(trainer: Trainer, dataset: Any) -> Any:
    # Importing TRL takes seconds; who has built one of its trainers has imported it.
    sft = sys.modules.get("trl.trainer.sft_trainer")
    if sft is None or not isinstance(trainer, sft.SFTTrainer):
        of_trl = [c.__name__ for c in type(trainer).__mro__ if c.__module__.startswith("trl.")]
        if of_trl:
            raise StayalignedError(
                f"{of_trl[0]} prepares its rows in its own way, which Lisa does not know",
                hint="Give a trainer that has prepared them: alignment_trainer=lambda model: …; or train the user's "
                "rows with transformers.Trainer or TRL's SFTTrainer.",
            )
        return dataset
    host: Any = trainer
    if host._is_vision_dataset:
        raise StayalignedError("Lisa trains on text; the user's rows hold images", hint="Drop the image columns.")
    if host._skip_prepare_dataset:
        return dataset
    # TRL decides once, from the user's first row, whether prompts are masked. That choice is not the alignment rows'.
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
            f"no alignment row leaves an answer to learn within max_length={host.args.max_length} tokens",
            hint="Raise max_length, or give shorter rows.",
        )
    return prepared


def _refuse_unusable(trainer: Trainer, prepared: Any) -> None:
    user = trainer.train_dataset
    batch = trainer.args.per_device_train_batch_size * max(trainer.args.world_size, 1)
    if len(prepared) < batch:
        raise StayalignedError(
            f"alignment_dataset has {len(prepared)} rows, fewer than a batch of {batch}, which would repeat some",
            hint="Give more safety rows, or a smaller per_device_train_batch_size.",
        )
    sample, users = prepared[0], user[0] if isinstance(user, Sized) and len(user) else None  # pyright: ignore
    if isinstance(sample, Mapping) and isinstance(users, Mapping):
        needed = {"input_ids", "labels"} & users.keys()
        if missing := sorted(needed - sample.keys()):
            raise StayalignedError(
                f"the alignment rows have no {' and no '.join(missing)}, which the user's rows have; "
                f"they have {', '.join(sorted(map(str, sample)))}",
                hint="Prepare both datasets in the same way: features for transformers.Trainer, text for SFTTrainer.",
            )
    for name, rows in (("train_dataset", user), ("alignment_dataset", prepared)):
        if isinstance(rows, Sized) and not any(_teaches(rows[i]) for i in range(len(rows))):  # pyright: ignore
            raise StayalignedError(
                f"every label of {name} is masked ({IGNORED}), so there is nothing to learn",
                hint="Leave the answers' tokens in `labels`; raise the length at which rows are cut.",
            )


def _teaches(row: Any) -> bool:
    """Whether a row has a label that counts; a row without labels is left to the collator."""
    if not isinstance(row, Mapping) or "labels" not in row:
        return True
    labels = row["labels"]
    return any(label != IGNORED for label in (labels.tolist() if isinstance(labels, Tensor) else labels))


def _plain(value: Any) -> Any:
    """The part of a row that JSON can hold; what has no plain form does not enter the fingerprint."""
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else type(value).__name__
