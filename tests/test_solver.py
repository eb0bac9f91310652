from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from fxprune.errors import BudgetError
from fxprune.planning.cost_evaluator import Floats, Ledger
from fxprune.planning.greedy import descend
from fxprune.planning.local_search import enumerate_cuts
from fxprune.planning.problem import Problem
from fxprune.planning.solver import solve
from fxprune.planning.widths import Rounding, Widths
from fxprune.structure.merging import Ints


def chain(sizes: list[int], costs: list[float]) -> Ledger:
    """A chain of layers between an input and an output of three: macs and params."""
    groups = len(sizes)
    dims = np.array([3.0, *sizes, 3.0, 1.0])
    shrink = np.vstack([np.zeros(groups), np.eye(groups), np.zeros((2, groups))])
    members = np.array([[layer, layer + 1] for layer in range(groups + 1)] * 2)
    factors = np.array(costs + [1.0] * (groups + 1))
    weights = np.repeat(np.eye(2), groups + 1, axis=0)
    return Ledger(("macs", "params"), dims, shrink, factors, members, weights)


def problem(
    scores: list[Floats], share: dict[int, float], costs: list[float] | None = None,
    rounding: int = 1, tolerance: float = 0.01, relax: bool = True,
) -> Problem:  # fmt: skip
    """A chain with these unit scores, and limits as shares of the whole by quantity."""
    sizes = [len(units) for units in scores]
    ledger = chain(sizes, costs or [100.0 / (1 + n) for n in range(len(sizes) + 1)])
    whole = ledger.values(np.zeros((1, len(sizes)), dtype=np.int64))[0]
    roundings = [Rounding(rounding, 8)]
    while relax and (finer := roundings[-1].finer()) is not None:
        roundings.append(finer)
    return Problem(
        tuple(f"g{n}" for n in range(len(sizes))),
        ledger,
        np.array([whole[quantity] * share.get(quantity, 2.0) for quantity in (0, 1)]),
        tuple(np.concatenate([[0], np.cumsum(np.sort(units))[:-1]]) for units in scores),
        tuple(tuple(Widths(size).losses(r) for size in sizes) for r in roundings),
        tuple(str(r.dense) for r in roundings),
        tolerance,
    )


def random_scores(seed: int, sizes: list[int]) -> list[Floats]:
    random = np.random.default_rng(seed)
    return [np.exp(random.normal(random.normal(0, 1), 1, size)) for size in sizes]


def all_cuts(problem: Problem) -> Ints:
    return np.array(list(itertools.product(*problem.levels[0])))


def best_landing(problem: Problem) -> Any:
    """The least sensitivity of any cut that lands, by trying all."""
    cuts = all_cuts(problem)
    lands = problem.lands(problem.costs.values(cuts))
    return min((problem.total(cut) for cut in cuts[lands]), default=None)


small = st.lists(st.integers(2, 6), min_size=2, max_size=4).filter(lambda sizes: sum(sizes) <= 12)


@settings(max_examples=80)
@given(small, st.integers(0, 10**6), st.floats(0.15, 0.95), st.booleans())
def test_lands_whenever_a_cut_of_few_units_does(
    sizes: list[int], seed: int, share: float, both: bool
) -> None:
    shares = {0: share, 1: share} if both else {0: share}
    task = problem(random_scores(seed, sizes), shares, tolerance=0.05)
    best = best_landing(task)
    assume(best is not None)
    found = solve(task)
    assert task.lands(found.values)
    np.testing.assert_array_equal(found.values, task.value(found.removed))
    assert found.loss == pytest.approx(best)


def test_is_close_to_the_best_cut_of_more_units() -> None:
    ratios = []
    for seed in range(12):
        task = problem(random_scores(seed, [10] * 4), {0: 0.3}, tolerance=0.02, relax=False)
        if (best := best_landing(task)) is not None:
            ratios.append(solve(task).loss / best)
    assert len(ratios) > 8
    assert np.median(ratios) == pytest.approx(1)
    assert np.quantile(ratios, 0.8) < 1.02


def test_enumeration_is_the_brute_force() -> None:
    task = problem(random_scores(3, [4, 3, 5]), {0: 0.5, 1: 0.6}, tolerance=0.1)
    cut = enumerate_cuts(task, 0)
    assert cut is not None
    assert task.total(cut) == pytest.approx(best_landing(task))


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.floats(0.1, 0.95), st.floats(0.1, 0.95))
@example(0, 0.5, 0.9)
def test_meets_all_budgets_and_uses_one_up(seed: int, macs: float, params: float) -> None:
    task = problem(random_scores(seed, [64, 96, 32, 128, 48]), {0: macs, 1: params}, rounding=16)
    found = solve(task)
    share = found.values / task.limits
    assert share.max() <= 1
    assert share.max() >= 0.99


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.floats(0.1, 0.9))
def test_widths_off_the_grid_are_few_and_noted(seed: int, macs: float) -> None:
    task = problem(random_scores(seed, [64, 96, 32, 128, 48]), {0: macs}, rounding=16)
    found = solve(task)
    off = [
        name
        for name, count, allowed in zip(task.names, found.removed, task.levels[0], strict=True)
        if count not in allowed
    ]
    assert len(off) <= 2
    assert all(any(note.startswith(f"{name} keeps") for note in found.notes) for name in off)
    assert len(found.notes) == len(off)


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.floats(0.2, 0.9), st.floats(0.5, 0.95))
def test_the_descent_to_a_smaller_budget_passes_through_the_larger_one(
    seed: int, macs: float, smaller: float
) -> None:
    scores = random_scores(seed, [64, 96, 32, 128, 48])
    _, large = descend(task := problem(scores, {0: macs}, rounding=16), task.least(), 0)
    _, little = descend(task := problem(scores, {0: macs * smaller}, rounding=16), task.least(), 0)
    if large is None or little is None:
        return
    assert (little >= large).all()


def test_smaller_budgets_nearly_remove_supersets() -> None:
    scores = random_scores(1, [64, 96, 32, 128, 48, 64, 64, 80])
    found = [solve(problem(scores, {0: share}, rounding=8)) for share in np.linspace(0.9, 0.1, 17)]
    losses = [solution.loss for solution in found]
    assert (np.diff(losses) > 0).all()
    given_back = [
        np.maximum(one.removed - two.removed, 0).sum() / one.removed.sum()
        for one, two in itertools.pairwise(found)
    ]
    assert np.mean(given_back) < 0.05


def test_free_units_go_first_and_dear_ones_stay() -> None:
    scores = [np.zeros(32), np.full(32, 1e6), np.zeros(32)]
    found = solve(problem(scores, {0: 0.5}))
    assert found.removed[1] == 0
    assert found.loss == 0


def test_beats_an_even_cut() -> None:
    scores = random_scores(7, [64, 96, 32, 128, 48])
    task = problem(scores, {0: 0.5})
    even = np.array([int(0.30 * len(units)) for units in scores])
    assert task.value(even)[0] >= 0.49 * task.value(task.least())[0]
    assert solve(task).loss < 0.8 * task.total(even)


def test_negative_scores_are_spent_first() -> None:
    scores = [np.array([-3.0, 1, 2, 3]), np.array([0.5, 1, 2, 3])]
    found = solve(problem(scores, {0: 0.9}, tolerance=0.4))
    assert found.removed.tolist() == [1, 0]


def test_does_nothing_within_the_budget() -> None:
    found = solve(problem(random_scores(0, [8, 8]), {0: 1.5}))
    assert found.removed.tolist() == [0, 0]
    assert "met without removing more" in found.notes[0]
    assert solve(problem(random_scores(0, [8, 8]), {0: 1.0})).notes == ()


def test_is_deterministic() -> None:
    scores = [np.ones(64), np.ones(64), np.ones(64)]
    found = [solve(problem(scores, {0: 0.37}, rounding=16)).removed.tolist() for _ in range(2)]
    assert found[0] == found[1]


def test_says_that_the_rest_cannot_shrink() -> None:
    with pytest.raises(BudgetError, match=r"with one unit per group .* layers that cannot shrink"):
        solve(problem(random_scores(0, [8, 8]), {0: 0.01}))


def test_says_which_least_widths_stop_it() -> None:
    task = problem(random_scores(0, [64, 64, 64]), {0: 0.004}, rounding=16, relax=False)
    with pytest.raises(BudgetError, match=r"smallest width: 3 groups \(g0, g1, g2"):
        solve(task)


def test_says_what_is_nearest_where_units_are_coarse() -> None:
    with pytest.raises(BudgetError, match=r"nearest plans keep .* set macs=\d+, or allow"):
        solve(problem(random_scores(0, [2, 2]), {0: 0.7}))


def test_lands_above_where_units_are_too_coarse_to_land_below() -> None:
    scores = random_scores(0, [3, 3])
    task = problem(scores, {0: 1.0})
    values = task.costs.values(all_cuts(task))[:, 0]
    share = float(np.sort(values)[4] / values.max())
    found = solve(problem(scores, {0: share / 1.005}))
    assert found.values[0] == np.sort(values)[4]
    assert "exceeded by 0.5 %" in found.notes[-1]


def test_lands_with_many_wide_groups() -> None:
    scores = random_scores(0, [256] * 100)
    task = problem(scores, {0: 0.4}, rounding=16)
    found = solve(task)
    assert found.values[0] >= 0.99 * task.limits[0]
