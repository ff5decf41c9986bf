"""The figures that keep the house as it was rebuilt: tests/house.py."""

import pytest
from house import BOUNDS, circles, figures


@pytest.fixture(scope="module")
def counted():
    return figures()


@pytest.mark.parametrize("name", BOUNDS)
def test_no_bound_is_passed(counted, name):
    counts, places = counted
    assert counts[name] <= BOUNDS[name], places.get(name, "")


def test_circles_are_found():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": set()}
    assert [sorted(circle) for circle in circles(graph)] == [["a", "b", "c"]]
    assert circles({"a": {"b"}, "b": set()}) == []
