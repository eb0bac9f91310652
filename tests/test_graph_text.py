from __future__ import annotations

from collections.abc import Callable

import torch
from blocks import Step
from strategies import Design, Network
from support import trace
from torch import Tensor, nn

from fxprune.graph.text import graph_text

EVERYTHING = Design(
    tuple(map(Step, ("residual", "split", "attention", "shuffle", "gate", "pad", "layer_norm"))),
    "flattened",
)


def test_wiring_is_shown(golden: Callable[[str, str], None]) -> None:
    network = Network(EVERYTHING)
    golden("graph_text", graph_text(trace(network, network.example())))


def test_is_the_same_for_the_same_model() -> None:
    network = Network(EVERYTHING)
    first, second = (trace(network, network.example()) for _ in range(2))
    assert graph_text(first) == graph_text(second.copy())


def test_types_other_than_float32_and_several_values_are_named() -> None:
    class Several(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            values, indices = x.max(1)
            return {"values": values.double(), "sum": indices.sum()}

    assert graph_text(trace(Several(), torch.randn(2, 3))).splitlines()[1:] == [
        "max_1: (2, int64 2) = max.dim(x, 1)",
        "getitem: 2 = getitem(max_1, 0)",
        "getitem_1: int64 2 = getitem(max_1, 1)",
        "to: float64 2 = to.dtype(getitem, torch.float64)",
        "sum_1: int64 scalar = sum(getitem_1)",
        "return to, sum_1",
    ]
