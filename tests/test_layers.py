from __future__ import annotations

from typing import Any

import pytest
import torch
from support import trace
from torch import Tensor, nn
from torch.nn import functional as F

from fxprune.calibration.layer_matrix import (
    PositionSample,
    blocks,
    layers,
    output_shape,
    weight_rows,
)
from fxprune.graph.node_args import argument

KINDS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "conv": (nn.Conv2d(4, 6, 3, padding=1), (3, 4, 7, 5)),
    "strided": (nn.Conv2d(4, 6, (3, 2), stride=(2, 3), padding=(1, 0), dilation=2), (2, 4, 11, 9)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4, padding="same"), (2, 4, 5, 5)),
    "conv1d": (nn.Conv1d(4, 6, 3, padding="valid"), (2, 4, 9)),
    "conv3d": (nn.Conv3d(2, 3, 2), (2, 2, 3, 4, 5)),
    "linear": (nn.Linear(4, 6), (3, 4)),
    "tokens": (nn.Linear(4, 6), (3, 5, 4)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_weights_times_features_are_the_value(kind: str) -> None:
    module, shape = KINDS[kind]
    x = torch.randn(shape, dtype=torch.float64)
    program = trace(module.double(), x)
    (layer,) = layers(program)
    value = module(x).detach()
    rows = weight_rows(layer.node, program.tensor(layer.weight).detach())
    for features, wanted in blocks(layer.node, x, value):
        bias = program.tensor(str(layer.bias)).detach().view(rows.shape[0], -1, 1)
        torch.testing.assert_close(rows @ features + bias, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_some_positions_are_positions_of_all(kind: str) -> None:
    module, shape = KINDS[kind]
    x = torch.randn(shape, dtype=torch.float64)
    program = trace(module.double(), x)
    (layer,) = layers(program)
    value = module(x).detach()
    rows = weight_rows(layer.node, program.tensor(layer.weight).detach())
    total = sum(features.shape[2] for features, _ in blocks(layer.node, x, value))
    some = PositionSample(2, torch.Generator().manual_seed(0))
    for features, wanted in blocks(layer.node, x, value, some):
        bias = program.tensor(str(layer.bias)).detach().view(rows.shape[0], -1, 1)
        torch.testing.assert_close(rows @ features + bias, wanted)
        assert features.shape[2] < total or value.dim() == 2


@pytest.mark.parametrize("kind", KINDS)
def test_the_shape_of_a_value_follows_the_batch(kind: str) -> None:
    module, shape = KINDS[kind]
    x = torch.randn(shape, dtype=torch.float64)
    (layer,) = layers(trace(module.double(), x))
    assert output_shape(layer.node, x[:1]) == module(x[:1]).shape


def test_the_batch_need_not_come_first() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x.mT).sum(0)  # type: ignore[no-any-return]

    (layer,) = layers(trace(Tokens(), torch.randn(5, 4, 2)))
    assert output_shape(layer.node, torch.randn(5, 7, 4)) == (5, 7, 6)


def test_a_sample_may_come_alone() -> None:
    x = torch.randn(4, 7, 5)
    module = nn.Conv2d(4, 6, 3)
    (layer,) = layers(trace(module, x))
    assert output_shape(layer.node, x) == module(x).shape


def test_rows_are_drawn_so_that_there_are_enough_positions() -> None:
    some = PositionSample(10, torch.Generator().manual_seed(0))
    drawn = [some.draw(8, 4) for _ in range(50)]
    rows = [item.tolist() for item in drawn if isinstance(item, Tensor)]
    assert len(rows) == 50
    assert all(len(set(part)) == 3 and part == sorted(part) for part in rows)  # 3 of 4 are 12
    assert {row for part in rows for row in part} == set(range(8))
    assert some.draw(3, 4) == slice(None)


def test_large_inputs_come_in_blocks() -> None:
    x = torch.randn(9, 64, 64, 64)
    program = trace(nn.Conv2d(64, 2, 3), x)
    (layer,) = layers(program)
    sizes = [f.shape[2] for f, _ in blocks(layer.node, x, torch.zeros(9, 2, 62, 62))]
    assert sizes == [3 * 62 * 62] * 3


class Wiring(nn.Module):
    """A shared layer, a tied weight, a computed weight, a bias with another reader."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.tied = nn.Linear(4, 4), nn.Linear(4, 4)
        self.also = nn.Linear(4, 4)
        self.also.weight = self.tied.weight
        self.scaled, self.open = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        x = self.twice(self.twice(x))
        x = self.also(self.tied(x)) + F.linear(x, 2 * self.scaled.weight)
        return self.open(x) + self.open.bias + self.scaled.bias


def test_calls_of_one_weight_are_one_layer() -> None:
    program = trace(Wiring(), torch.randn(2, 4))
    found = {layer.weight: (len(layer.calls), layer.bias) for layer in layers(program)}
    tied = found.pop("tied.weight", None) or found.pop("also.weight")  # it has both names
    assert tied == (2, None)
    assert found == {"twice.weight": (2, "twice.bias"), "open.weight": (1, None)}


def test_arguments_by_name() -> None:
    program = trace(nn.Conv2d(2, 2, 1, groups=2, bias=False), torch.randn(1, 2, 3, 3))
    (layer,) = layers(program)
    assert argument(layer.node, "groups") == 2
    assert argument(layer.node, "dilation") in (1, [1, 1])
    with pytest.raises(KeyError):
        argument(layer.node, "no")
