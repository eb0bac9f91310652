from __future__ import annotations

from typing import Any

import pytest
import torch
from support import trace
from torch import Tensor, nn
from torch.nn import functional as F

from fxprune.calibration.layer_matrix import layers
from fxprune.reconstruction.derivatives import Linearisable
from fxprune.reconstruction.region import comparable, cut

ACTIVATIONS = (
    F.hardsigmoid, F.hardswish, F.mish, F.silu, F.gelu, F.elu, F.selu, F.celu, F.softplus,
    F.hardtanh, F.hardshrink, F.softshrink, F.tanhshrink, F.logsigmoid, F.rrelu, F.glu, F.softsign,
    F.relu, F.relu6, F.leaky_relu, torch.sigmoid, torch.tanh, torch.erf, torch.exp, torch.sin,
)  # fmt: skip


class Around(nn.Module):
    """A function of a layer's value, and a layer behind it."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.first, self.last, self.function = nn.Linear(4, 6), nn.LazyLinear(2), function

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first(x)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("function", ACTIVATIONS, ids=lambda function: function.__name__)
def test_every_activation_has_a_form_with_two_derivatives(function: Any) -> None:
    x = torch.randn(3, 4)
    model = Around(function).eval()
    model(x)
    program = trace(model, x)
    region = cut(next(iter(layers(program))), 8, comparable(program, program.copy()))
    assert region is not None
    form, obstacle = Linearisable().form(region)
    assert obstacle is None
    (place,) = (node for node in program.graph.nodes if node.op == "placeholder")
    with torch.no_grad():
        values = form.run(program, {place: x}, {})
        torch.testing.assert_close(values[form.outputs[-1]], model(x))
