from __future__ import annotations

import pytest
import torch
from support import assert_same
from torch import Tensor, nn

import fxprune
from fxprune.graph.canonical import functional_form

aten = torch.ops.aten


class InPlace(nn.Module):
    """Writes into tensors, and into views of them, that are read before and after."""

    def __init__(self, case: str) -> None:
        super().__init__()
        self.case = case

    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        match self.case:
            case "whole":
                before = y + 1
                y.relu_()
                return before + y
            case "view of the whole":
                rows = y.view(-1)
                y.add_(1)
                return y + rows.view_as(y)
            case "part":
                y[:, :2] = 0
                return y + x
            case "part by a view":
                head = y[:, 1:3]
                head.mul_(3)
                return y * x
            case "parts one after the other":
                y[..., 1] = x[..., 0]
                y[..., -2] = x.sum(-1)
                y[1:, 0] += 1
                return y
            case "part copied":
                y[:, 1:3] = x[:, :2] + y[:, 2:]
                return y
            case "part copied from one":
                y[:, 1:3] = x[:, :1].double().exp()
                return y
            case "part of a part":
                inner = y[1:][:, 1:3]
                inner.mul_(x[1:, 1:3])
                return y + inner.sum()
            case _:
                y.mul_(x).add_(1).clamp_(min=0)
                return y


CASES = (
    "whole", "view of the whole", "part", "part by a view", "parts one after the other",
    "part of a part", "part copied", "part copied from one", "chain",
)  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_in_place_calls_become_functional(case: str) -> None:
    model = InPlace(case)
    x = torch.randn(3, 4)
    program = fxprune.trace(model, (x.clone(),))
    for rows in (3, 5):
        inputs = torch.randn(rows, 4, requires_grad=True)
        wanted, made = model(inputs.clone()), program(inputs.clone())
        assert_same(made, wanted)
        assert_same(*(torch.autograd.grad(out.sum(), inputs)[0] for out in (made, wanted)))
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert not [name for name in names if name.partition(".default")[0].endswith("_")], names


class Prefixed(nn.Module):
    """No prefix tokens: a part of a concatenation that has no elements."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.out = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.wide(x)
        result: Tensor = self.out(torch.cat([y[:, :0], y[:, 0:].relu()], 1))
        return result


def test_parts_without_elements_vanish() -> None:
    model, x = Prefixed(), torch.randn(3, 5, 4)
    program = fxprune.trace(model, (x,))
    assert_same(program(x), model(x))
    assert aten.cat.default not in {node.target for node in program.graph.nodes}
    (group,) = [g for g in fxprune.find_groups(program) if g.frozen_because is None]
    assert len(group.units) == 6


def test_functional_forms() -> None:
    assert functional_form(aten.relu_.default) is aten.relu.default
    assert functional_form(aten.add_.Tensor) is aten.add.Tensor
    assert functional_form(aten.relu.default) is None
    assert functional_form(torch.relu) is None


class Splits(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        a, b, c = x.chunk(3, 1)
        d, e = x.split(5, dim=-2)
        return torch.cat([a, b, c, d, e], 1)


def test_splits_are_spelt_by_their_sizes() -> None:
    x = torch.randn(2, 7)
    program = fxprune.trace(Splits(), (x[:, :, None].transpose(1, 2).transpose(1, 2),))
    sizes = [n.args[1] for n in program.graph.nodes if n.target is aten.split_with_sizes.default]
    assert sizes == [[3, 3, 1], [5, 2]]


def test_a_channel_shuffle_is_views() -> None:
    x = torch.randn(2, 6, 3, 3)
    program = fxprune.trace(nn.ChannelShuffle(3), (x,))
    assert aten.channel_shuffle.default not in {node.target for node in program.graph.nodes}
    assert_same(program(x), nn.ChannelShuffle(3)(x))
