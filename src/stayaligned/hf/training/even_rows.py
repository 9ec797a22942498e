"""An order of training rows in which the added rows are spread evenly over the user's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch.utils.data import Sampler

from stayaligned.algorithms.lisa import RowStream
from stayaligned.core.errors import StayalignedError

if TYPE_CHECKING:
    from transformers import Trainer


def spread_evenly(trainer: Trainer, added: int) -> None:
    """Let a trainer read its last `added` rows evenly between the others, both in a new random order in each epoch.

    The order is a function of the seed and the epoch, so that a resumed run reads the same rows.

    Args:
        trainer: a trainer that is built, on all rows.
        added: the number of added rows, which are the last ones.

    Raises:
        StayalignedError: if the trainer packs rows, or has another strategy of sampling.
    """
    args: Any = trainer.args
    if vars(args).get("packing") or getattr(args, "train_sampling_strategy", "random") != "random":
        raise StayalignedError(
            "`order: even` needs single rows in an order of its own",
            hint="Remove training.packing and training.train_sampling_strategy, or set `order: shuffled`.",
        )
    rows: Any = trainer.train_dataset
    sampler = EvenSampler(len(rows) - added, added, args.seed if args.data_seed is None else args.data_seed, trainer)
    trainer._get_train_sampler = lambda *_args, **_options: sampler  # pyright: ignore[reportPrivateUsage]


class EvenSampler(Sampler[int]):
    """The order of one epoch: added row j of n among N + n rows is at position ⌊(j + 1)(N + n)/n⌋ − 1."""

    def __init__(self, users: int, added: int, seed: int, trainer: Trainer) -> None:
        self._users, self._added = RowStream(users, seed, "users"), RowStream(added, seed, "added")
        self._trainer = trainer

    def __len__(self) -> int:
        return self._users.size + self._added.size

    def __iter__(self) -> Iterator[int]:
        # The host counts epochs as a float that is whole at their ends, and loads it on resuming.
        epoch = int(self._trainer.state.epoch or 0)
        users, added = (iter(rows.take(epoch * rows.size, rows.size)) for rows in (self._users, self._added))
        n = self._added.size
        places = {(j + 1) * len(self) // n - 1 for j in range(n)}
        for place in range(len(self)):
            yield self._users.size + next(added) if place in places else next(users)
