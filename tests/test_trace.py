from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from strategies import Design, Network, designs
from support import assert_same
from torch import Tensor, nn

import fxprune
from fxprune.errors import TraceError


@given(designs())
def test_computes_what_the_model_does_at_every_batch_size(design: Design) -> None:
    network = Network(design)
    program = fxprune.trace(network, (network.example(1),))
    for batch in (1, 3):
        x = network.example(batch)
        assert_same(program(x), network(x))


def test_the_model_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    program = fxprune.trace(model, (torch.randn(2, 3, 4, 4),))
    assert all(module.training for module in model.modules())
    program.tensor("0.weight").data.zero_()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_control_flow_that_depends_on_data_is_refused_with_the_reason() -> None:
    with pytest.raises(TraceError, match=r"cannot capture Branching.*control flow is the usual"):
        fxprune.trace(Branching(), (torch.randn(2, 3),))
    with pytest.raises(TraceError, match=r"write trace\(model, \(x,\)\)"):
        fxprune.trace(Branching(), torch.randn(2, 3))  # type: ignore[arg-type]


def test_inputs_that_the_model_does_not_take_are_told_from_what_cannot_be_captured() -> None:
    with pytest.raises(TraceError, match=r"Conv2d does not run on inputs of 1x1x8x8 .*channels"):
        fxprune.trace(nn.Conv2d(3, 4, 3), (torch.randn(1, 1, 8, 8),))


class FixedBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, 12) @ torch.ones(12, 1)


def test_a_model_that_fixes_its_batch_is_captured_with_it() -> None:
    program = fxprune.trace(FixedBatch(), (torch.ones(2, 3, 4),))
    assert program.dynamic == ()
    assert program(torch.ones(2, 3, 4)).tolist() == [[12.0], [12.0]]


class Structured(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, pair: tuple[Tensor, Tensor], *, scale: float = 2.0) -> dict[str, Any]:
        first, second = pair
        return {"sum": self.layer(first) + second, "parts": [first * scale]}


def test_nested_inputs_and_outputs_keep_their_structure() -> None:
    model = Structured()
    pair = (torch.randn(2, 3), torch.randn(2, 2))
    program = fxprune.trace(model, (pair,))
    assert_same(program(pair), model(pair))
    assert set(program(pair)) == {"sum", "parts"}
    assert program.dynamic == (frozenset({0}), frozenset({0}))


def test_dynamic_dimensions_may_be_named() -> None:
    model = nn.Conv2d(3, 4, 3)
    asked = {0: frozenset({0, 2})}
    program = fxprune.trace(model, (torch.randn(1, 3, 8, 8),), dynamic=asked)
    assert program.dynamic == (frozenset({0, 2}),)
    x = torch.randn(2, 3, 12, 8)
    assert_same(program(x), model(x))
