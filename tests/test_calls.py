from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fxprune.graph.node_args import argument, arguments, assign, packet_of, paddings

aten = torch.ops.aten


def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    graph = fx.Graph()
    places = [graph.placeholder("x") if isinstance(item, Tensor) else item for item in args]
    return graph.call_function(target, tuple(places), kwargs)


def test_arguments_wherever_they_are_given() -> None:
    node = call(aten.conv2d.default, torch.ones(()), torch.ones(()), None, [2, 2], groups=3)
    given = arguments(node)
    assert list(given) == ["input", "weight", "bias", "stride", "padding", "dilation", "groups"]
    assert (given["stride"], given["groups"], given["bias"]) == ([2, 2], 3, None)
    assert given["dilation"] in (1, [1, 1])
    with pytest.raises(KeyError, match="mode"):
        argument(node, "mode")


def test_assignment_keeps_the_place() -> None:
    node = call(aten.conv2d.default, torch.ones(()), torch.ones(()), None, [2, 2], groups=3)
    assign(node, "groups", 5)
    assign(node, "stride", [1, 1])
    assign(node, "dilation", 2)
    assert node.args[3] == [1, 1]
    assert node.kwargs == {"groups": 5, "dilation": 2}


def test_packets() -> None:
    assert packet_of(call(aten.relu.default, torch.ones(()))) is aten.relu
    assert packet_of(call(torch.relu, torch.ones(()))) is None
    assert packet_of(fx.Graph().placeholder("x")) is None


@pytest.mark.parametrize("padding", ["same", "valid", 1, (2, 1)])
@pytest.mark.parametrize(("kernel", "dilation"), [((3, 3), 1), ((4, 3), 1), ((2, 5), (3, 1))])
def test_paddings_are_those_of_the_convolution(padding: Any, kernel: Any, dilation: Any) -> None:
    x = torch.randn(1, 1, 9, 8)
    layer = nn.Conv2d(1, 1, kernel, padding=padding, dilation=dilation)
    around = paddings(padding, kernel, layer.dilation)
    padded = F.pad(x, [size for pair in reversed(around) for size in pair])
    plain = F.conv2d(padded, layer.weight, layer.bias, dilation=dilation)
    torch.testing.assert_close(plain, layer(x))
