from __future__ import annotations

import pytest
import torch

from fxprune.sensitivity.running_stats import StoppingRule, Tally, misplaced


def test_mean_and_error_are_those_of_the_sample() -> None:
    drawn = torch.randn(50, 4, dtype=torch.float64)
    tally = Tally(4)
    for sample in drawn:
        tally.add(sample)
    torch.testing.assert_close(tally.mean, drawn.mean(0))
    torch.testing.assert_close(tally.error, drawn.std(0) / 50**0.5)


def test_samples_that_are_not_finite_are_dropped_and_counted() -> None:
    tally = Tally(2)
    tally.add(torch.tensor([1.0, torch.nan]))
    tally.add(torch.tensor([1.0, 2.0]))
    assert (tally.count, tally.dropped, tally.mean.tolist()) == (1, 1, [1.0, 2.0])
    assert tally.error.isinf().all()


def test_expected_number_of_misplaced_units_is_what_happens() -> None:
    truth = torch.rand(400, dtype=torch.float64)
    errors = 0.02 + 0.05 * torch.rand(400, dtype=torch.float64)
    taken = truth.argsort()[:120]
    expected, happened = [], []
    for _ in range(60):
        scores = truth + errors * torch.randn(400, dtype=torch.float64)
        expected.append(misplaced(scores, errors, 0.3))
        wrong = 120 - torch.isin(scores.argsort()[:120], taken).sum()
        happened.append(2 * int(wrong))
    mean = sum(happened) / 60
    assert sum(expected) / 60 == pytest.approx(mean, rel=0.15)


def test_units_that_are_certain_are_not_misplaced() -> None:
    scores, errors = torch.tensor([0.0, 0.0, 0.0, 1.0]), torch.zeros(4)
    assert misplaced(scores, errors, 0.5) == 0
    assert misplaced(scores, errors + 1, 0.0) == 0
    assert misplaced(scores, errors + 1, 1.0) == 0


def test_probing_stops_once_the_cut_has_settled_and_not_before_the_least() -> None:
    rule = StoppingRule(cut=0.5, tolerance=0.01, least=8, cap=100)
    scores = torch.tensor([1.0, 2.0, 10.0, 11.0])
    assert rule.settled(scores, torch.full((4,), 0.1), 8)
    assert not rule.settled(scores, torch.full((4,), 0.1), 7)
    assert not rule.settled(scores, torch.full((4,), 10.0), 50)
    assert not StoppingRule(cut=0.5, tolerance=0, least=16, cap=300).settled(
        scores, torch.zeros(4), 99
    )


def test_rounds_grow_and_end_at_the_cap() -> None:
    rule = StoppingRule(cut=0.5, tolerance=0.01, least=16, cap=300)
    made, sizes = 0, []
    while size := rule.next_round(made):
        sizes.append(size)
        made += size
    assert made == 300
    assert sizes[:3] == [16, 16, 16]
    assert max(sizes) > 16
