from __future__ import annotations

import pytest
import torch
from support import assert_same, randomise_norms, trace
from torch import Tensor, nn

from fxprune.data.datasets import Arrays
from fxprune.data.roles import Data
from fxprune.pipeline.context import Context
from fxprune.training.norms import restate_norms

X = 3 + torch.randn(64, 3, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
CONTEXT = Context(Data(Arrays(X)))


def network() -> nn.Sequential:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4)
    )
    randomise_norms(model)
    return model.double().eval()


def test_evaluation_stays_as_it_was_and_training_becomes_alike() -> None:
    program = trace(network(), X[:2])
    before = program(X)
    apart = float((program.copy().train()(X) - before).detach().square().mean())
    assert restate_norms(program, CONTEXT, samples=64, batch_size=24) == 2
    assert_same(program(X), before)
    assert float((program.train()(X) - before).detach().square().mean()) < 1e-4 * apart


def test_statistics_are_those_behind_norms_that_stay() -> None:
    model = network()
    program = trace(model, X[:2])
    restate_norms(program, CONTEXT, samples=64, batch_size=24)
    read = model[:4](X)
    assert_same(program.tensor("4.running_mean"), read.mean((0, 2, 3)))
    assert_same(program.tensor("4.running_var"), read.var((0, 2, 3)))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(x) + self.bn(2 * x)  # type: ignore[no-any-return]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.other.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) + self.other(2 * x)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "model", [Twice(), Tied(), nn.BatchNorm2d(3, affine=False), nn.Conv2d(3, 3, 1)], ids=repr
)
def test_leaves_norms_that_cannot_make_up_for_it(model: nn.Module) -> None:
    program = trace(model.double(), X[:2])
    before = {name: tensor.clone() for name, tensor in program.graph_module.state_dict().items()}
    assert restate_norms(program, CONTEXT, samples=64, batch_size=24) == 0
    after = program.graph_module.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
