from __future__ import annotations

import pytest
import torch
from support import randomise_norms, trace
from torch import Tensor, nn

from fxprune.data.datasets import Arrays
from fxprune.data.roles import Data
from fxprune.errors import BudgetError, InputError
from fxprune.graph.cost import cost
from fxprune.graph.program import Program
from fxprune.passes import (
    AnnotateSensitivity,
    PlanChannels,
    Reconstruct,
    RemoveBlocks,
    RemoveChannels,
)
from fxprune.pipeline.context import Context
from fxprune.pipeline.driver import Pipeline
from fxprune.planning.blocks import remove_blocks
from fxprune.structure.branches import Branch, find_branches, remove_branch

X = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self, inner: int, size: float) -> None:
        super().__init__()
        self.conv1, self.bn = nn.Conv2d(8, inner, 3, padding=1), nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, 8, 3, padding=1)
        with torch.no_grad():
            self.conv2.weight.mul_(size)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.conv2(torch.relu(self.bn(self.conv1(x)))))


def network(sizes: tuple[float, ...] = (1.0, 0.01, 0.5, 0.1)) -> nn.Module:
    torch.manual_seed(0)
    blocks = [Block(8 + 4 * number, size) for number, size in enumerate(sizes)]
    return randomise_norms(
        nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), *blocks, nn.AdaptiveAvgPool2d(1),
            nn.Flatten(), nn.Linear(8, 5),
        )
    ).eval()  # fmt: skip


def context(program: Program) -> Context:
    return Context(Data(Arrays(X)), dense=program.copy())


def test_the_branch_that_matters_least_goes_first() -> None:
    program = trace(network(), X[:2])
    dense = cost(program).macs
    outcome = RemoveBlocks(macs="60%")(program, context(program))
    assert outcome.details["blocks"][0]["title"] == "3 (conv1, bn, conv2)"
    assert outcome.changes == len(outcome.details["blocks"])
    assert outcome.details["blocks"][-1]["macs"] == cost(program).macs <= 0.6 * dense
    assert outcome.details["zero_then_remove"] < 1e-5
    assert RemoveBlocks(macs="60%")(program, Context(dense=trace(network(), X[:2]))).changes == 0


def test_takes_what_judging_all_anew_would_on_a_simple_network() -> None:
    program = trace(network(), X[:2])
    wanted = program(X).detach()
    calls = 0

    def shift(other: Program) -> float:
        nonlocal calls
        calls += 1
        return float((other(X) - wanted).detach().square().mean())

    greedy, left, moved = program.copy(), cost(program).macs, 0.0
    expected = []
    for _ in range(3):
        prices = {}
        for branch in find_branches(greedy):
            trial = greedy.copy()
            remove_branch(trial, _same(trial, branch.add.name))
            saved = left - cost(trial).macs
            prices[branch.add.name] = (shift(trial) - moved) / saved
        name = min(prices, key=prices.__getitem__)
        remove_branch(greedy, _same(greedy, name))
        left, moved = cost(greedy).macs, shift(greedy)
        expected.append(name)
    exhaustive, calls = calls, 0
    found = list(remove_blocks(program, left, shift, lambda branch: True))
    assert [one.add for one in found] == expected
    assert found[-1].shift == pytest.approx(moved)
    assert calls < exhaustive


def _same(program: Program, add: str) -> Branch:
    return next(branch for branch in find_branches(program) if branch.add.name == add)


@pytest.mark.parametrize("pattern", ["3", "3.conv1.*", "add_1"])
def test_what_is_protected_stays(pattern: str) -> None:
    program = trace(network(), X[:2])
    RemoveBlocks(macs="60%", protect=(pattern,))(program, context(program))
    assert "3.conv1.weight" in program.graph_module.state_dict()


@pytest.mark.parametrize(
    ("step", "error", "reason"),
    [
        (RemoveBlocks(macs="1%"), BudgetError, "remain after all removable residual branches"),
        (RemoveBlocks(protect=("layer9",)), InputError, "no residual branch matches 'layer9'"),
    ],
)
def test_what_cannot_be_is_an_error(
    step: RemoveBlocks, error: type[Exception], reason: str
) -> None:
    program = trace(network(), X[:2])
    with pytest.raises(error, match=reason):
        step(program, context(program))


def test_widths_follow_and_reconstruction_mends_both() -> None:
    program = trace(network(), X[:2])
    given = context(program)
    dense = cost(program).macs
    steps = (
        RemoveBlocks(macs="80%"), AnnotateSensitivity(criterion="magnitude-l2"),
        PlanChannels(macs="50%", round_to=1), RemoveChannels(),
    )  # fmt: skip
    Pipeline(steps).run(program, given)
    assert cost(program).macs <= 0.505 * dense
    error = _error(program, given)
    Pipeline((Reconstruct(batch_size=10),)).run(program, given)
    assert _error(program, given) < 0.5 * error


def _error(program: Program, given: Context) -> float:
    assert given.dense is not None
    with torch.no_grad():
        return float((program(X) - given.dense(X)).square().mean())
