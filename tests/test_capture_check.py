from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from strategies import Design, Network, designs
from torch import Tensor, nn

import fxprune
from fxprune.errors import TraceError
from fxprune.graph.capture_check import check_capture, other_batch
from fxprune.graph.program import Program
from fxprune.graph.trace import trace


class Odd(nn.Module):
    """A layer whose forward does something that a capture cannot follow."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.layer = kind, nn.Linear(16, 16)
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        match self.kind:
            case "batch size":
                return y * (2 if x.shape[0] > 3 else 1)
            case "attribute":
                last, self.last = self.last, None if torch.compiler.is_compiling() else y.detach()
                return y if last is None else y + last
            case "compiling":
                return y * (1 if torch.compiler.is_compiling() else 2)
            case "python's random numbers":
                return y * random.random()
            case "mode":
                return y * (2 if self.training else 1)
            case "draws":
                return y + torch.randn_like(y)
            case "not a number":
                return y / (0 if torch.compiler.is_compiling() else y.abs().max())
        return y


def model_of(kind: str) -> nn.Module:
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(16, 16), Odd(kind))
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), inner, nn.Linear(16, 4)).eval()


@pytest.mark.parametrize(
    "kind", ["batch size", "compiling", "python's random numbers", "not a number"]
)
def test_a_capture_that_differs_names_the_first_module(kind: str) -> None:
    with pytest.raises(TraceError, match=r"first module whose output differs is '2\.1'"):
        fxprune.trace(model_of(kind), (torch.randn(2, 8),))


def test_state_outside_of_buffers_shows_at_the_second_call() -> None:
    with pytest.raises(TraceError, match="between calls that is not in its buffers"):
        fxprune.trace(model_of("attribute"), (torch.randn(2, 8),))


def test_random_numbers_of_pytorch_are_no_difference() -> None:
    fxprune.trace(model_of("draws"), (torch.randn(2, 8),))


def test_what_differs_in_training_mode_alone_is_an_error_there() -> None:
    model, x = model_of("mode"), torch.randn(6, 8)
    program = fxprune.trace(model, (x,))
    assert check_capture(model, program, [(x,)]) == ()
    with pytest.raises(TraceError, match=r"in training mode.*differs is '2\.1'"):
        check_capture(model, program, [(x,)], training=True)


class Regularised(nn.Module):
    """Dropout, a path that training drops at random, a batch norm and an auxiliary output."""

    class DropPath(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop_prob = 0.3

        def forward(self, x: Tensor) -> Tensor:
            if not self.training:
                return x
            return x * x.new_empty(len(x), 1).bernoulli_(0.7).div_(0.7)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.drop = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.5)
        self.second, self.path = nn.Linear(16, 16), self.DropPath()
        self.out, self.auxiliary = nn.Linear(16, 3), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Any:
        y = self.drop(self.norm(self.first(x)).relu())
        y = y + self.path(self.second(y))
        return (self.out(y), self.auxiliary(y)) if self.training else self.out(y)


def test_training_leaves_notes_on_what_capture_dropped_and_changes_nothing() -> None:
    torch.manual_seed(0)
    model, x = Regularised().eval(), torch.randn(6, 8)
    program = fxprune.trace(model, (x,))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    stored = {name: value.clone() for name, value in program.graph_module.state_dict().items()}
    notes = check_capture(model, program, [(x,)], training=True)
    assert any("returns 2 values" in note for note in notes)
    assert any("stochastic depth (DropPath) was left out" in note for note in notes)
    assert not model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    for name, value in program.graph_module.state_dict().items():
        assert torch.equal(value, stored[name]), name
    assert not model._forward_hooks


class Cancels(nn.Module):
    """Large values that cancel, added up in another order while captured."""

    def forward(self, x: Tensor) -> Tensor:
        total = x.sum(1) if torch.compiler.is_compiling() else x.flip(1).cumsum(1)[:, -1]
        result: Tensor = total - x.double().sum(1).to(x.dtype) + 1
        return result


def test_rounding_is_no_difference() -> None:
    model, x = Cancels(), torch.randn(2, 4000) * 1e3
    program = trace(model, (x,), check=False)
    assert (program(x) - model(x)).abs().max() > 1e-3
    check_capture(model, program, [(x,)])


def test_inputs_of_another_size_are_in_another_order() -> None:
    x = torch.arange(6.0).view(2, 3)
    program = fxprune.trace(nn.Linear(3, 2), (x,))
    (grown,) = other_batch(program, (x,)) or ()
    assert grown.tolist() == [[0, 1, 2], [3, 4, 5], [3, 4, 5], [0, 1, 2]]
    fixed = Program(program.graph_module, (x,))
    assert other_batch(fixed, (x,)) is None


@settings(max_examples=10)
@given(designs())
def test_random_networks_are_captured_as_they_are_in_both_modes(design: Design) -> None:
    network = Network(design)
    x = (network.example(3),)
    program = fxprune.trace(network, x)
    check_capture(network, program, [x], training=True)
    weight = next(name for name, _ in program.graph_module.named_parameters())
    with torch.no_grad():
        program.tensor(weight).mul_(1.5)
    changed = program(*x)
    if not torch.allclose(changed, network(*x), rtol=1e-3):
        with pytest.raises(TraceError, match="differ on inputs of 3x3x4x4"):
            check_capture(network, program, [x])
