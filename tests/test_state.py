"""State that a model writes in forward: right at every call, kept in files, trainable."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from support import assert_same
from torch import Tensor, nn

import fxprune
from fxprune.graph import serialize
from fxprune.graph.functionalize import state_kept, state_of


class Stateful(nn.Module):
    """Keeps a moving average, the last features, a number of calls, or a weight that shrinks."""

    mean: Tensor
    calls: Tensor
    cache: Tensor

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.features, self.out = nn.Linear(8, 16), nn.Linear(16, 4)
        self.register_buffer("mean", torch.zeros(16))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("cache", torch.zeros(3, 6, 16))
        self.scale = nn.Parameter(torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        y = self.features(x).relu()
        match self.kind:
            case "chain":
                self.mean.mul_(0.9).add_(y.mean(0), alpha=0.1)
                y = y - self.mean
            case "assigned":
                self.mean = 0.9 * self.mean + 0.1 * y.mean(0)
                y = y - self.mean
            case "under no_grad":
                with torch.no_grad():
                    self.mean.lerp_(y.mean(0), 0.1)
                y = y * self.mean
            case "data":
                self.mean.data.copy_(self.mean + y.mean(0))
                self.calls += 1
                y = y - self.mean / self.calls
            case "part of a cache":
                self.cache[:, 2:3] = y[:3, None]
                y = y[:3] + self.cache.mean(1)
            case "rolled cache":
                self.cache = torch.cat([self.cache[:, 1:], y[:3, None]], 1)
                y = y[:3] + self.cache.mean(1)
            case "by index":
                self.cache[torch.arange(3), torch.tensor([0, 4, 1])] = y[:3]
                y = y[:3] + self.cache.mean(1)
            case "read before and after":
                before = self.mean + 1
                self.mean.add_(y.mean(0))
                y = y * before + self.mean
            case "weight":
                with torch.no_grad():
                    self.scale.mul_(0.5)
                y = y * self.scale
        result: Tensor = self.out(y)
        return result


WRITES = {
    "chain": ("mean",), "assigned": ("mean",), "under no_grad": ("mean",),
    "data": ("mean", "calls"), "part of a cache": ("cache",), "rolled cache": ("cache",),
    "by index": ("cache",), "read before and after": ("mean",), "weight": ("scale",),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRITES)
def test_state_is_right_at_every_call_and_kept_in_files(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Stateful(kind).eval()
    before = copy.deepcopy(model.state_dict())
    batches = [torch.randn(3, 8) for _ in range(4)]
    program = fxprune.trace(model, (batches[0],))
    assert set(state_of(program)) == set(WRITES[kind])
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items()), "by capture"
    with torch.no_grad():
        for x in batches[:2]:
            assert_same(program(x), model(x))
        serialize.save(program, tmp_path / "program.pt2")
        loaded = serialize.load(tmp_path / "program.pt2")
        for x in batches[2:]:
            expected = model(x)
            assert_same(program(x), expected)
            assert_same(loaded(x), expected)
    for name in WRITES[kind]:
        assert_same(program.tensor(name).double(), model.state_dict()[name].double())


@pytest.mark.parametrize("kind", WRITES)
def test_state_does_not_hinder_training(kind: str) -> None:
    program = fxprune.trace(Stateful(kind).eval(), (torch.randn(3, 8),)).train()
    weights = list(program.graph_module.parameters())
    first = [weight.detach().clone() for weight in weights]
    optimiser = torch.optim.SGD(weights, 0.1)
    for _ in range(3):
        optimiser.zero_grad()
        program(torch.randn(3, 8)).square().sum().backward()
        optimiser.step()
    moved = [not torch.equal(old, new) for old, new in zip(first, weights, strict=True)]
    assert sum(moved) >= 4, "both layers train"


@pytest.mark.parametrize("kind", ["chain", "assigned", "part of a cache", "rolled cache", "weight"])
def test_units_are_removed_from_layers_and_their_state_alike(kind: str) -> None:
    torch.manual_seed(0)
    model, x = Stateful(kind).eval(), torch.randn(3, 8)
    program = fxprune.trace(model, (x,))
    group = next(g for g in fxprune.find_groups(program) if len(g.units) == 16)
    assert group.frozen_because is None
    doomed = {group: [0, 3, 9]}
    check = fxprune.verify_removal(program, doomed)
    assert check.error is not None
    assert check.error <= 1e-5
    assert not any(program.tensor(name).any() for name in state_of(program) if name != "scale")
    with torch.no_grad():
        model.out.weight[:, [0, 3, 9]] = 0  # nothing reads the units any more
        fxprune.remove_units(program, doomed)
        for _ in range(2):
            assert_same(program(x), model(x))


def test_state_is_put_back() -> None:
    program = fxprune.trace(Stateful("chain").eval(), (torch.randn(3, 8),))
    with torch.no_grad(), state_kept(program):
        program(torch.randn(3, 8))
        assert program.tensor("mean").any()
    assert not program.tensor("mean").any()
