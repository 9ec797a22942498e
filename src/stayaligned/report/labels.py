"""Where the labels of a scatter plot go so that none covers another label or a point. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Box(NamedTuple):
    """A rectangle with its lower left corner at (x, y)."""

    x: float
    y: float
    width: float
    height: float

    def overlap(self, other: Box) -> float:
        """Area that both cover."""
        wide = min(self.x + self.width, other.x + other.width) - max(self.x, other.x)
        tall = min(self.y + self.height, other.y + other.height) - max(self.y, other.y)
        return max(0.0, wide) * max(0.0, tall)

    def inside(self, other: Box) -> bool:
        """Whether no part of it sticks out of `other`."""
        return (
            other.x <= self.x
            and other.y <= self.y
            and self.x + self.width <= other.x + other.width
            and self.y + self.height <= other.y + other.height
        )


_RADII = (9, 14, 22, 32, 44, 58, 74, 92, 112, 136, 164, 200, 240, 290)
_ANGLES = tuple(math.radians(angle) for angle in (0, 180, 90, 270, 30, 150, 330, 210, 60, 120, 300, 240))
_GAP = 2.0


def place_labels(
    points: Sequence[tuple[float, float]], sizes: Sequence[tuple[float, float]], obstacles: Sequence[Box], area: Box
) -> list[Box]:
    """A box per point, near it, inside `area`; the points in the tightest crowd choose first.

    Greedy: each label takes the nearest of a fixed set of places around its point that touches no label already
    placed, and there the one that covers the least of `obstacles` (marks, error bars). Where every place touches a
    label, the least bad one is taken.

    Args:
        points: what is labelled, in pixels.
        sizes: width and height of each label, in pixels.
        obstacles: what labels should not cover.
        area: what labels must stay in.
    """
    crowd = [sum(math.dist(p, q) < 60 for q in points) for p in points]
    placed: dict[int, Box] = {}
    for index in sorted(range(len(points)), key=lambda i: (-crowd[i], points[i], i)):
        best: tuple[float, Box] | None = None
        for radius, box in _places(points[index], sizes[index]):
            padded = Box(box.x - _GAP, box.y - _GAP, box.width + 2 * _GAP, box.height + 2 * _GAP)
            cost = (
                radius
                + 1e3 * (not box.inside(area))
                + 1e2 * sum(padded.overlap(other) for other in placed.values())
                + 3.0 * sum(box.overlap(obstacle) for obstacle in obstacles)
            )
            if best is None or cost < best[0]:
                best = cost, box
        if best is not None:
            placed[index] = best[1]
    return [placed[index] for index in range(len(points))]


def _places(point: tuple[float, float], size: tuple[float, float]) -> Iterator[tuple[float, Box]]:
    """Boxes on rings around a point, each touching the ring from outside."""
    width, height = size
    for radius in _RADII:
        for angle in _ANGLES:
            x, y = point[0] + radius * math.cos(angle), point[1] + radius * math.sin(angle)
            left = x - width * (1 - math.cos(angle)) / 2
            yield radius, Box(left, y - height * (1 - math.sin(angle)) / 2, width, height)
