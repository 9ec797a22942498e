"""Exchange the layers that a projection selects for others, matched in number, kind or norm."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, ClassVar, Literal

from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import LayerReport
from stayaligned.defenses.patching.layers import LayerSelector

if TYPE_CHECKING:
    from stayaligned.algorithms.alignment_delta import AlignmentDelta
    from stayaligned.algorithms.safe_lora import Operator

LayerOrder = Literal["random", "most_similar"]
"""The order in which other layers are taken."""
LayerMatch = Literal["norm", "count", "kind"]
"""What the other layers have in common with those of the projection."""

_TOLERANCE = 0.02
"""Allowed relative difference of the norms that are left, for random layers of the same kinds."""
_MOST_DRAWS = 10_000


@dataclass(frozen=True)
class ExchangedLayers:
    """A selector that takes other layers than the projection defense `like`."""

    name: ClassVar[str] = "drop_other"

    like: LayerSelector
    order: LayerOrder
    match: LayerMatch
    seed: int

    @property
    def lowest(self) -> int | None:
        """The `lowest` of `like`."""
        return self.like.lowest

    def operator_for(self, delta: AlignmentDelta) -> Operator:
        """Return the operator of `like`."""
        return self.like.operator_for(delta)

    def select(self, similarities: Mapping[str, float]) -> frozenset[str]:
        """Return the layers that `like` selects, which `exchange` replaces."""
        return self.like.select(similarities)

    def exchange(self, chosen: frozenset[str], reports: Mapping[str, LayerReport]) -> frozenset[str]:
        """Return the layers to change instead of the chosen ones.

        Args:
            chosen: the layers that `like` selects.
            reports: a report for every layer that can be changed.

        Raises:
            StayalignedError: if no draw of random layers of the same kinds leaves the same norm.
        """
        if self.order == "most_similar":
            ordered = sorted(reports, key=lambda name: (-reports[name].similarity, name))
            return self._take(ordered, chosen, reports)
        rng, names = random.Random(self.seed), sorted(reports)  # noqa: S311
        target = _square(reports, reports.keys() - chosen)
        for _ in range(_MOST_DRAWS):
            drawn = self._take(rng.sample(names, len(names)), chosen, reports)
            left = _square(reports, reports.keys() - drawn)
            if self.match != "kind" or abs(left**0.5 - target**0.5) <= _TOLERANCE * target**0.5:
                return drawn
        raise StayalignedError(
            f"{self.name}: none of {_MOST_DRAWS} random choices of as many layers of each kind as {self.like.name} "
            f"leaves the same norm of the update to {_TOLERANCE:.0%}",
            hint="Set match to norm or count, or compare with another threshold.",
        )

    def _take(
        self, ordered: Sequence[str], chosen: frozenset[str], reports: Mapping[str, LayerReport]
    ) -> frozenset[str]:
        """Return the first layers of an order that match the chosen ones."""
        if self.match == "count":
            return frozenset(ordered[: len(chosen)])
        if self.match == "kind":
            wanted, taken = Counter(map(_kind, chosen)), Counter[str]()
            found: set[str] = set()
            for name in ordered:
                if taken[_kind(name)] < wanted[_kind(name)]:
                    taken[_kind(name)] += 1
                    found.add(name)
            return frozenset(found)
        removed = _square(reports, chosen)
        sums = [0.0, *accumulate(reports[name].update_norm ** 2 for name in ordered)]
        nearest = min(range(len(sums)), key=lambda count: abs(sums[count] - removed))
        return frozenset(ordered[:nearest])


def _kind(name: str) -> str:
    return name.rpartition(".")[2].partition("[")[0]  # without the index of an expert


def _square(reports: Mapping[str, LayerReport], names: frozenset[str] | set[str]) -> float:
    """Return the squared norm of the update in some layers."""
    return sum(reports[name].update_norm ** 2 for name in names)
