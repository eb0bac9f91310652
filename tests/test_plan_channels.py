from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from support import trace
from torch import Tensor, nn

from fxprune.errors import BudgetError, InputError
from fxprune.graph.cost import cost
from fxprune.graph.facts import PLAN, SENSITIVITY, Plan, Sensitivity
from fxprune.graph.program import Program
from fxprune.passes import PlanChannels
from fxprune.pipeline.context import Context
from fxprune.pipeline.contract import Outcome
from fxprune.structure.groups import find_groups
from fxprune.structure.removal import remove_units


class Net(nn.Module):
    """A residual stage of 64, an inner layer of 96, a depthwise pair of 48, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 3, padding=1)
        self.inner, self.back = nn.Conv2d(64, 96, 3, padding=1), nn.Conv2d(96, 64, 3, padding=1)
        self.widen, self.depth = nn.Conv2d(64, 48, 1), nn.Conv2d(48, 48, 3, padding=1, groups=48)
        self.head = nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = x + self.back(self.inner(x).relu())
        return self.head(self.depth(self.widen(x)).mean((2, 3)))  # type: ignore[no-any-return]


RESIDUAL, INNER, DEPTH = "stem.weight:0", "inner.weight:0", "widen.weight:0"


def scored(scores: Mapping[str, Tensor] | None = None, seed: int = 0) -> Program:
    """The net with the scores given, random ones elsewhere."""
    program = trace(Net(), torch.randn(1, 3, 8, 8))
    random = torch.Generator().manual_seed(seed)
    found = {
        group.name: torch.rand(len(group.units), generator=random, dtype=torch.float64)
        for group in find_groups(program)
        if group.frozen_because is None
    }
    assert set(found) == {RESIDUAL, INNER, DEPTH}
    program.put(SENSITIVITY, Sensitivity("test", found | dict(scores or {})))
    return program


def plan(program: Program, **options: Any) -> tuple[Plan, Outcome]:
    outcome = PlanChannels(**options)(program, Context(dense=program.copy()))
    return program.get(PLAN), outcome


def left(program: Program, plan: Plan) -> dict[str, int]:
    sizes = {group.name: len(group.units) for group in find_groups(program)}
    return {name: sizes[name] - len(plan.remove.get(name, ())) for name in (RESIDUAL, INNER, DEPTH)}


def cut(program: Program, plan: Plan) -> Program:
    small = program.copy()
    groups = {group.name: group for group in find_groups(small)}
    remove_units(small, {groups[name]: units for name, units in plan.remove.items()})
    return small


@pytest.mark.parametrize(
    "options",
    [{"macs": 0.5}, {"macs": "50%"}, {"params": "2x"}, {"size": "150KB"}, {"macs": "30%"},
     {"macs": "60%", "params": "45%"}, {"macs": "3M", "size": "70%"}],
)  # fmt: skip
def test_the_cut_costs_what_was_asked(options: dict[str, Any]) -> None:
    program = scored()
    dense = cost(program)
    found, outcome = plan(program, **options)
    after = cost(cut(program, found))
    shares = []
    for target in PlanChannels(**options).targets:
        value, limit = (getattr(one, target.quantity) for one in (after, dense))
        assert found.predicted[target.quantity] == value
        shares.append(value / target.limit(limit))
    assert 0.99 <= max(shares) <= 1
    assert outcome.changes == 0
    assert outcome.predicted == found.predicted


def test_widths_are_rounded() -> None:
    program = scored()
    found, _ = plan(program, macs="50%", tolerance=0.05)
    kept = left(program, found)
    assert kept[RESIDUAL] % 16 == 0
    assert kept[INNER] % 16 == 0
    assert kept[DEPTH] % 8 == 0
    assert found.notes == ()


def test_the_least_sensitive_units_go() -> None:
    scores = torch.arange(96, dtype=torch.float64).flip(0) * 1e-6
    found, _ = plan(scored({INNER: scores}), macs="50%")
    units = found.remove[INNER]
    assert units == tuple(range(96 - len(units), 96))


def test_dear_groups_stay() -> None:
    program = scored({INNER: torch.full((96,), 1e6, dtype=torch.float64)})
    found, _ = plan(program, macs="60%")
    assert INNER not in found.remove


def test_protected_groups_stay_and_are_reported() -> None:
    program = scored()
    found, outcome = plan(program, macs="50%", protect=("stem", "depth.*"))
    assert set(found.remove) == {INNER}
    skipped = {skip.node for skip in outcome.skips if "protected" in skip.reason}
    assert skipped == {RESIDUAL, DEPTH}


def test_own_ratios_hold_whatever_the_scores() -> None:
    program = scored({INNER: torch.full((96,), 1e6, dtype=torch.float64)})
    found, _ = plan(program, macs="50%", ratios={"inner.weight:0": 0.34})
    assert left(program, found)[INNER] == 64
    found, _ = plan(program, macs="50%", ratios={"widen.weight:0": 0.0})
    assert DEPTH not in found.remove


def test_keeps_the_minimum_and_the_share() -> None:
    program = scored({RESIDUAL: torch.zeros(64, dtype=torch.float64)})
    found, _ = plan(program, macs="40%", min_units=32)
    assert min(left(program, found).values()) >= 32
    found, _ = plan(program, macs="40%", max_ratio=0.5)
    assert left(program, found)[RESIDUAL] == 32


def test_normalizing_makes_groups_comparable() -> None:
    tiny = torch.linspace(1e-9, 1e-8, 96, dtype=torch.float64)
    alone, _ = plan(program := scored({INNER: tiny}), macs="50%")
    assert left(program, alone)[RESIDUAL] == 64
    for normalize in ("group-mean", "group-max"):
        shared, _ = plan(program := scored({INNER: tiny}), macs="50%", normalize=normalize)
        assert left(program, shared)[INNER] > left(program, alone)[INNER]
        assert left(program, shared)[RESIDUAL] < 64


def test_limits_refer_to_the_dense_model() -> None:
    program = scored()
    dense = program.copy()
    first, _ = plan(program, macs="70%")
    small = cut(program, first)
    small.put(SENSITIVITY, Sensitivity("test", {
        group.name: torch.rand(len(group.units), dtype=torch.float64)
        for group in find_groups(small) if group.frozen_because is None
    }))  # fmt: skip
    PlanChannels(macs="50%")(small, Context(dense=dense))
    after = cost(cut(small, small.get(PLAN))).macs
    assert 0.495 <= after / cost(dense).macs <= 0.5


def test_a_path_leads_to_the_budget_geometrically() -> None:
    program = scored()
    for path in (0.25, 0.5, 1.0):
        found, _ = plan(program, macs="25%", path=path)
        share = found.predicted["macs"] / cost(program).macs
        assert 0.99 <= share / 0.25**path <= 1


def test_frozen_and_unscored_groups_are_reported() -> None:
    program = scored()
    scores = dict(program.get(SENSITIVITY).scores)
    del scores[DEPTH]
    program.put(SENSITIVITY, Sensitivity("bn-scale", scores))
    _, outcome = plan(program, macs="60%")
    reasons = {skip.node: skip.reason for skip in outcome.skips}
    assert reasons[DEPTH] == "no bn-scale score"
    assert "output" in reasons["head.weight:0"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, "no budget"),
        ({"macs": "50%", "protect": ("stemm",)}, "no group matches 'stemm'; did you mean stem"),
        ({"macs": "half"}, "'half' is not a valid macs budget"),
        ({"size": 300}, "needs a unit"),
        ({"macs": 0.5, "round_to": 0}, "at least 1"),
        ({"macs": 0.5, "depthwise_round_to": 2}, "a multiple of 4"),
        ({"macs": 0.5, "max_ratio": 1.5}, "max-ratio is 1.5"),
        ({"macs": 0.5, "ratios": {"stem": -1.0}}, "stem is -1.0"),
    ],
)
def test_refuses_wrong_options(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        plan(scored(), **options)


def test_refuses_scores_of_another_program() -> None:
    with pytest.raises(InputError, match="do not fit its 96 units"):
        plan(scored({INNER: torch.zeros(5)}), macs="50%")
    with pytest.raises(InputError, match="not finite"):
        plan(scored({INNER: torch.full((96,), torch.nan)}), macs="50%")


def test_says_what_stops_a_budget() -> None:
    with pytest.raises(BudgetError, match="smallest width: 3 groups"):
        plan(scored(), macs="1%", min_units=24)
    with pytest.raises(BudgetError, match="layers that cannot shrink"):
        plan(scored(), params="0.01%")
