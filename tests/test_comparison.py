from __future__ import annotations

import math

import pytest
import support
import torch

from fxprune.graph.comparison import relative_error, worst_error

NAN, INF = math.nan, math.inf


def test_finite_values_are_compared_relative_to_the_largest() -> None:
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5])
    assert relative_error(b, a) == pytest.approx(0.2)
    assert relative_error(b, a) == pytest.approx(support.relative_error(a, b))
    assert relative_error(torch.zeros(2), torch.full((2,), 0.5)) == 0.5
    assert relative_error(torch.tensor([3 + 4j]), torch.tensor([3 + 0j])) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("expected", "found"),
    [([1, 2], [1, NAN]), ([NAN, 2], [1, 2]), ([INF, 2], [NAN, 2]), ([INF, 2], [-INF, 2]),
     ([NAN, NAN], [NAN, 2]), ([1, 2], [1, INF]), ([1, 2], [1, 2, 3])],
)  # fmt: skip
def test_what_is_no_number_on_one_side_differs(expected: list[float], found: list[float]) -> None:
    left, right = torch.tensor(expected), torch.tensor(found)
    assert relative_error(left, right) == INF
    assert worst_error((torch.ones(2), left), (torch.ones(2), right)) == INF


def test_the_same_infinities_in_the_same_places_are_equal() -> None:
    left = torch.tensor([NAN, INF, -INF, 2.0])
    right = left.clone()
    right[3] = 3.0
    assert relative_error(left, left.clone()) == 0
    assert relative_error(left, right) == 0.5


def test_trees_have_the_same_leaves() -> None:
    x = torch.ones(2)
    assert worst_error({"a": x, "b": [None, 3]}, {"a": x, "b": [None, 3]}) == 0
    assert worst_error((x, None), (x, 0)) == INF
    assert worst_error((x, 3), (x, 4)) == INF
    assert worst_error((x,), (x, x)) == INF
