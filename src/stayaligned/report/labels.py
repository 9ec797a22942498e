"""Where to write the names of points so that none covers another: pure geometry, in pixels."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

_RADII = (9.0, 14.0, 22.0, 32.0, 44.0, 58.0, 74.0, 92.0, 112.0, 134.0, 158.0, 184.0, 215.0, 250.0)
_ANGLES = tuple(math.tau * step / 24 for step in range(24))
_LEADER_BEYOND = 16.0

Point = tuple[float, float]
Line = tuple[Point, Point]


@dataclass(frozen=True, slots=True)
class Box:
    """An upright rectangle."""

    left: float
    bottom: float
    right: float
    top: float

    def overlaps(self, other: Box) -> bool:
        """Whether the two share any area."""
        return (
            self.left < other.right and other.left < self.right and self.bottom < other.top and other.bottom < self.top
        )

    def within(self, other: Box) -> bool:
        """Whether this one lies wholly in the other."""
        return (
            other.left <= self.left
            and self.right <= other.right
            and other.bottom <= self.bottom
            and self.top <= other.top
        )

    def nearest(self, x: float, y: float) -> Point:
        """The point of the rectangle nearest to (x, y)."""
        return min(max(x, self.left), self.right), min(max(y, self.bottom), self.top)


@dataclass(frozen=True, slots=True)
class Placed:
    """A name's rectangle, and the line from it to its point if they lie apart."""

    box: Box
    leader: Line | None


def place(
    points: Sequence[Point],
    sizes: Sequence[Point],
    *,
    inside: Box,
    marker: float,
    clutter: Sequence[Point] = (),
) -> list[Placed | None]:
    """A place for each point's label; None where none is free.

    Greedy, the most crowded point first: the nearest place that covers no label and no mark, at best without a leader
    that crosses anything; covering one of the `clutter` points is allowed at a price.

    Args:
        points: what is labelled.
        sizes: width and height of each label.
        inside: where labels may be.
        marker: half the side of a point's mark.
        clutter: lesser marks, which are better left free.
    """
    marks = [Box(x - marker, y - marker, x + marker, y + marker) for x, y in points]
    order = sorted(range(len(points)), key=lambda i: (sum(math.dist(points[i], p) ** 0.5 for p in points), i))
    placed: dict[int, Placed] = {}
    # Where a crowd leaves no clean place, a leader that crosses something is better than no name.
    for clean in (True, False):
        for index in (i for i in order if i not in placed):
            best = _best(index, points, sizes, inside, marks, placed.values(), clutter, clean=clean)
            if best is not None:
                placed[index] = best
    return [placed.get(index) for index in range(len(points))]


def _best(
    index: int,
    points: Sequence[Point],
    sizes: Sequence[Point],
    inside: Box,
    marks: Sequence[Box],
    placed: Collection[Placed],
    clutter: Sequence[Point],
    *,
    clean: bool,
) -> Placed | None:
    best: tuple[float, Placed] | None = None
    for candidate, distance in _candidates(points[index], sizes[index]):
        if best is not None and distance >= best[0]:
            break
        if not candidate.box.within(inside) or any(candidate.box.overlaps(mark) for mark in marks):
            continue
        if any(candidate.box.overlaps(other.box) for other in placed):
            continue
        if clean and _crosses(candidate, marks[index], marks, placed):
            continue
        cost = distance + 5.0 * sum(_holds(candidate.box, point) for point in clutter)
        if best is None or cost < best[0]:
            best = (cost, candidate)
    return None if best is None else best[1]


def _candidates(point: Point, size: Point) -> Iterator[tuple[Placed, float]]:
    """Places around the point and their price, which grows with the radius."""
    (x, y), (width, height) = point, size
    for radius in _RADII:
        for angle in _ANGLES:
            toward_x, toward_y = math.cos(angle), math.sin(angle)
            # The label's near side, not its middle, lies on the circle.
            center = x + toward_x * (radius + width / 2), y + toward_y * (radius + height / 2)
            box = Box(center[0] - width / 2, center[1] - height / 2, center[0] + width / 2, center[1] + height / 2)
            end = box.nearest(x, y)
            far = math.dist(end, point) > _LEADER_BEYOND
            yield Placed(box, (point, end) if far else None), radius


def _crosses(candidate: Placed, own: Box, marks: Sequence[Box], placed: Collection[Placed]) -> bool:
    """Whether its leader meets a label, another mark or a leader, or its label somebody's leader."""
    if any(other.leader is not None and _cuts(other.leader, candidate.box) for other in placed):
        return True
    leader = candidate.leader
    if leader is None:
        return False
    # Marks that touch its own can't be told apart anyway.
    if any(_cuts(leader, mark) for mark in marks if not mark.overlaps(own)):
        return True
    return any(
        _cuts(leader, other.box) or (other.leader is not None and _cross(leader, other.leader)) for other in placed
    )


def _cuts(line: Line, box: Box) -> bool:
    """Whether the line passes through the rectangle (Liang and Barsky's clipping)."""
    (x0, y0), (x1, y1) = line
    enter, leave = 0.0, 1.0
    for start, step, low, high in ((x0, x1 - x0, box.left, box.right), (y0, y1 - y0, box.bottom, box.top)):
        if step == 0:
            if not low < start < high:
                return False
            continue
        near, far = sorted(((low - start) / step, (high - start) / step))
        enter, leave = max(enter, near), min(leave, far)
    return enter < leave


def _cross(first: Line, second: Line) -> bool:
    """Whether two lines properly cross."""

    def side(line: Line, point: Point) -> float:
        (x0, y0), (x1, y1) = line
        return (x1 - x0) * (point[1] - y0) - (y1 - y0) * (point[0] - x0)

    return side(first, second[0]) * side(first, second[1]) < 0 and side(second, first[0]) * side(second, first[1]) < 0


def _holds(box: Box, point: Point) -> bool:
    return box.left <= point[0] <= box.right and box.bottom <= point[1] <= box.top


def along(line: Line, step: float) -> list[Point]:
    """Points on the line, about `step` apart, both ends included."""
    (x0, y0), (x1, y1) = line
    pieces = max(1, round(math.dist(*line) / step))
    return [(x0 + (x1 - x0) * i / pieces, y0 + (y1 - y0) * i / pieces) for i in range(pieces + 1)]
