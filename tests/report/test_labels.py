"""Labels of the scatter plot don't cover each other."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from stayaligned.report.labels import Box, place_labels

AREA = Box(0, 0, 800, 500)
places = st.tuples(st.floats(10, 790), st.floats(10, 490))


@settings(deadline=None, max_examples=60)
@given(st.lists(places, min_size=1, max_size=15), st.data())
def test_labels_stay_inside_and_never_overlap(points: list[tuple[float, float]], data: st.DataObject) -> None:
    sizes = [(data.draw(st.floats(20, 110)), 13.0) for _ in points]
    boxes = place_labels(points, sizes, [Box(x - 6, y - 6, 12, 12) for x, y in points], AREA)
    assert all(box.inside(AREA) for box in boxes)
    assert all(first.overlap(second) == 0 for first, second in itertools.combinations(boxes, 2))


def test_fifteen_arms_in_one_place_still_get_labels_apart() -> None:
    boxes = place_labels([(780.0, 480.0)] * 15, [(100.0, 13.0)] * 15, [], AREA)
    assert all(box.inside(AREA) for box in boxes)
    assert all(first.overlap(second) == 0 for first, second in itertools.combinations(boxes, 2))


def test_a_lone_label_stands_beside_its_point_and_off_obstacles() -> None:
    (free,) = place_labels([(400.0, 250.0)], [(60.0, 12.0)], [], AREA)
    assert 0 < free.x - 400 < 20
    (moved,) = place_labels([(400.0, 250.0)], [(60.0, 12.0)], [Box(402, 230, 200, 40)], AREA)
    assert moved.overlap(Box(402, 230, 200, 40)) == 0
