from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxprune.training.comparison import Z90, paired_drop
from fxprune.training.evaluate import Evaluation


def evaluation(hits: list[bool]) -> Evaluation:
    found = torch.tensor(hits, dtype=torch.bool)
    return Evaluation(float(found.double().mean()), len(hits), None, found)


def test_differences_are_counted_sample_by_sample() -> None:
    before = evaluation([True] * 8 + [False] * 2)
    after = evaluation([True] * 5 + [False] * 3 + [True] + [False])
    drop = paired_drop(before, after)
    assert drop is not None
    assert drop.points == pytest.approx(20.0)
    lost = [0] * 5 + [1] * 3 + [-1, 0]
    variance = (sum((x - 0.2) ** 2 for x in lost) + 1) / 10
    assert drop.error == pytest.approx(100 * math.sqrt(variance / 10))
    assert drop.upper == pytest.approx(drop.points + Z90 * drop.error)


def test_equal_predictions_of_few_samples_are_no_certainty() -> None:
    few = paired_drop(evaluation([True] * 20), evaluation([True] * 20))
    many = paired_drop(evaluation([True] * 2000), evaluation([True] * 2000))
    assert few is not None
    assert many is not None
    assert few.points == many.points == 0
    assert few.upper > 1 > many.upper


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=30, max_size=200))
def test_the_samples_needed_make_the_interval_fit(pairs: list[tuple[bool, bool]]) -> None:
    drop = paired_drop(evaluation([a for a, _ in pairs]), evaluation([b for _, b in pairs]))
    assert drop is not None
    limit = drop.points + 0.5
    needed = drop.samples_needed(limit)
    assert needed is not None
    shrunk = drop.error * math.sqrt(drop.samples / needed)
    assert drop.points + Z90 * shrunk <= limit + 1e-9
    assert drop.samples_needed(drop.points) is None


def test_other_samples_cannot_be_compared() -> None:
    assert paired_drop(evaluation([True]), evaluation([True, False])) is None
    assert paired_drop(evaluation([True]), Evaluation(1.0, 1)) is None
