from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from stayaligned.report.labels import Box, place

INSIDE = Box(0, 0, 600, 400)
coordinate = st.floats(0, 1)
crowd = st.lists(st.tuples(coordinate.map(lambda x: 600 * x), coordinate.map(lambda y: 400 * y)), max_size=14)


@given(points=crowd, width=st.integers(20, 140))
def test_no_label_covers_another_or_a_mark_or_leaves_the_frame(points, width):
    places = [p for p in place(points, [(width, 14)] * len(points), inside=INSIDE, marker=5) if p]
    assert not any(a.box.overlaps(b.box) for a, b in combinations(places, 2))
    marks = [Box(x - 5, y - 5, x + 5, y + 5) for x, y in points]
    assert not any(p.box.overlaps(mark) for p in places for mark in marks)
    assert all(p.box.within(INSIDE) for p in places)


def test_thirteen_arms_in_three_corners_all_get_a_label():
    points = [(10 + 6 * i, 15 + i) for i in range(5)] + [(580 - 5 * i, 385 - i) for i in range(5)] + [(30, 380)] * 3
    assert all(place(points, [(100, 14)] * 13, inside=INSIDE, marker=5))


def test_a_label_far_from_its_mark_has_a_leader_that_ends_at_both():
    points = [(300.0, 200.0)] * 12
    for found in place(points, [(90, 14)] * 12, inside=INSIDE, marker=5):
        assert found is not None
        if found.leader is not None:
            start, end = found.leader
            assert start == (300.0, 200.0)
            assert found.box.nearest(*start) == end


def test_no_room_is_none_rather_than_an_overlap():
    assert place([(50, 50)], [(200, 14)], inside=Box(0, 0, 100, 100), marker=5) == [None]
