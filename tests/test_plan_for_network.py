"""Plans for whole networks: moves, the path of the search, and carrying a plan out."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fxprune.data.batches import Batch
from fxprune.errors import InputError
from fxprune.graph.cost import cost
from fxprune.graph.facts import Sensitivity
from fxprune.graph.program import Program
from fxprune.graph.trace import trace
from fxprune.passes import ApplyPlan
from fxprune.pipeline.context import Context
from fxprune.planning.widths import Rounding
from fxprune.search.damage import Damage
from fxprune.search.descent import Descent, Point
from fxprune.search.moves import Ranking, moved, moves, plan_of
from fxprune.search.plan import NetworkPlan, branch_id, carry_out
from fxprune.structure.branches import find_branches
from fxprune.structure.groups import find_groups

X = torch.randn(64, 4, 8, 8, generator=torch.Generator().manual_seed(5))


class Block(nn.Module):
    def __init__(self, width: int, inner: int, scale: float) -> None:
        super().__init__()
        self.one, self.norm = nn.Conv2d(width, inner, 3, padding=1), nn.BatchNorm2d(inner)
        self.two = nn.Conv2d(inner, width, 3, padding=1)
        with torch.no_grad():
            self.two.weight.mul_(scale)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.two(torch.relu(self.norm(self.one(x)))))


class Net(nn.Module):
    """Three residual blocks of falling weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(4, 8, 3, padding=1)
        self.blocks = nn.Sequential(Block(8, 8, 2.0), Block(8, 12, 0.5), Block(8, 8, 0.05))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.blocks(torch.relu(self.stem(x))).mean((2, 3)))
        return logits


@pytest.fixture(scope="module")
def dense() -> Program:
    return trace(Net().eval(), (X[:2],))


@pytest.fixture(scope="module")
def ranking(dense: Program) -> Ranking:
    groups = [group for group in find_groups(dense) if group.frozen_because is None]
    scores = {g.name: torch.rand(len(g.units), dtype=torch.float64) for g in groups}
    return Ranking(dense, Sensitivity("random", scores), Rounding(4, 4))


def macs(program: Program) -> float:
    return float(cost(program).macs)


def walked(dense: Program, ranking: Ranking, least: float) -> list[Point]:
    descent = Descent(ranking, Damage(dense, [Batch((X,), None)]).of, macs)
    return list(descent.walk(dense, least))


def test_every_move_is_what_its_plan_carries_out(dense: Program, ranking: Ranking) -> None:
    """Two moves, one after the other, make the program that the plan makes from the dense one."""
    every = list(moves(dense, ranking))
    assert {move.kind for move in every} == {"branch", "width"}
    for first in every:
        small = moved(dense, first, ranking)
        for second in itertools.islice(moves(small, ranking), 2):
            smaller = moved(small, second, ranking)
            plan = plan_of([first, second], ranking)
            again = dense.copy()
            carry_out(again, plan)
            assert macs(again) == macs(smaller)
            torch.testing.assert_close(again(X), smaller(X))


def test_points_cost_less_and_less_and_can_be_carried_out(dense: Program, ranking: Ranking) -> None:
    points = walked(dense, ranking, 0.55 * macs(dense))
    assert len(points) > 2
    costs = [point.cost for point in points]
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] <= 0.55 * macs(dense)
    for point in points:
        program = dense.copy()
        carry_out(program, point.plan)
        assert macs(program) == point.cost


def test_the_cheapest_first_step_is_the_best_of_all_moves(dense: Program, ranking: Ranking) -> None:
    damage, whole = Damage(dense, [Batch((X,), None)]), macs(dense)
    prices = {}
    for move in moves(dense, ranking):
        small = moved(dense, move, ranking)
        prices[move] = damage.of(small) / (whole - macs(small))
    points = walked(dense, ranking, whole - 1)
    assert points[1].move == min(prices, key=lambda move: prices[move])


def test_branches_go_in_the_order_of_what_they_do(dense: Program) -> None:
    branches_alone = Ranking(dense, Sensitivity("none", {}), Rounding(4, 4))
    points = walked(dense, branches_alone, 0.6 * macs(dense))
    names = [branch_id(branch) for branch in find_branches(dense)]
    assert points[-1].plan.branches[:2] == (names[2], names[1])


def test_a_path_ends_when_its_time_is_over(dense: Program, ranking: Ranking) -> None:
    descent = Descent(ranking, lambda _: 0.0, macs, deadline=-math.inf)
    assert [point.move for point in descent.walk(dense, 0.0)] == [None]
    assert descent.stopped_by_time


def test_damage_is_none_for_the_dense_program_and_infinite_for_nan(dense: Program) -> None:
    damage = Damage(dense, [Batch((X,), None)])
    assert damage.of(dense) == 0
    broken = dense.copy()
    with torch.no_grad():
        broken.tensor("head.bias").fill_(float("nan"))
    assert damage.of(broken) == math.inf


def test_damage_ignores_what_recalibrated_norms_make_good(dense: Program) -> None:
    damage, shifted = Damage(dense, [Batch((X,), None)]), dense.copy()
    with torch.no_grad():
        shifted.tensor("blocks.1.one.bias").add_(3.0)  # the norm behind it takes it away
    assert damage.of(shifted) < 1e-8


def test_the_pass_carries_its_plan_out_and_says_what_is_missing(
    dense: Program, ranking: Ranking
) -> None:
    plan = walked(dense, ranking, 0.5 * macs(dense))[-1].plan
    step, program = ApplyPlan(plan.branches, plan.units), dense.copy()
    outcome = step(program, Context())
    assert outcome.changes == len(plan.branches) + sum(map(len, plan.units.values()))
    expected = dense.copy()
    carry_out(expected, plan)
    np.testing.assert_array_equal(program(X).detach(), expected(X).detach())
    with pytest.raises(InputError, match="residual branches that the program does not"):
        carry_out(dense.copy(), NetworkPlan(("no:one",)))
    with pytest.raises(InputError, match="groups that the program does not have: nothing"):
        carry_out(dense.copy(), NetworkPlan((), {"nothing": (0,)}))
