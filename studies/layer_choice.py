"""Compare the layers that Safe LoRA drops with other layers, from finished grids of `layer_choice.yaml`.

    python studies/layer_choice.py out/layer-choice [real/layers]

Prints a table for each directory: harm and accuracy where the chosen layers are dropped and where others are, and how
the random draws compare with the choice of the same seed: a draw dominates if it has at most as much harm and at least
as much accuracy, one of them strictly.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

from stayaligned import load_results


class Point(NamedTuple):
    """What a model measured, each 0 to 1."""

    harm: float
    accuracy: float

    def dominates(self, other: Point) -> bool:
        """Return whether this is no worse in both and better in one."""
        return self != other and self.harm <= other.harm and self.accuracy >= other.accuracy


Points = Mapping[str, Mapping[int, Point]]
"""The points by arm and seed."""


def read_points(directory: str) -> Points:
    """Read harm and accuracy of every arm and seed."""
    values: dict[tuple[str, int], dict[str, float]] = defaultdict(dict)
    for row in load_results(directory):
        if row["metric"] in ("harmful_score", "finetune_accuracy") and row["primary_judge"] is not False:
            values[str(row["arm"]), int(row["seed"])][row["metric"]] = float(row["value"])
    points: dict[str, dict[int, Point]] = defaultdict(dict)
    for (arm, seed), found in values.items():
        points[arm][seed] = Point(found["harmful_score"], found["finetune_accuracy"])
    return points


def table(points: Points) -> Iterator[str]:
    """Yield the lines of a Markdown table."""
    yield "| layers dropped | harm / accuracy | range | draws that dominate the choice | dominated |"
    yield "|---|---:|---:|---:|---:|"
    for arm, seeds in points.items():
        count = re.fullmatch(r"Drop (\d+)", arm)
        if arm == "SFT attacked":
            yield row("none", list(seeds.values()))
        elif count:
            yield row(f"{count[1]}, as Safe LoRA chooses them", list(seeds.values()))
            yield from compare(points, arm, count[1])


def compare(points: Points, chosen: str, count: str) -> Iterator[str]:
    """Yield the rows of the layers that were dropped instead of a choice."""
    kinds = {
        "the same norm, most similar ones": rf"Most similar {count}",
        "the same norm, at random": rf"Random {count}( norm)? \d+",
        "the same kinds and norm, at random": rf"(Kinds {count}|Random {count} kind) \d+",
    }
    for title, pattern in kinds.items():
        pairs = [
            (point, points[chosen][seed])
            for arm, seeds in points.items()
            if re.fullmatch(pattern, arm)
            for seed, point in seeds.items()
        ]
        if pairs:
            better = sum(point.dominates(choice) for point, choice in pairs)
            worse = sum(choice.dominates(point) for point, choice in pairs)
            yield row(title, [point for point, _ in pairs], f"{better} of {len(pairs)} | {worse}")


def row(title: str, found: Sequence[Point], compared: str = " | ") -> str:
    """Return a row: the mean, then the ranges if there are several points."""
    mean = f"{100 * fmean(p.harm for p in found):.0f} / {100 * fmean(p.accuracy for p in found):.0f}"
    ends = [f"{100 * min(v):.0f}–{100 * max(v):.0f}" for v in ([p.harm for p in found], [p.accuracy for p in found])]
    return f"| {title} | {mean} | {' / '.join(ends)} | {compared} |"


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(f"{name}\n")
        print("\n".join(table(read_points(name))), end="\n\n")
