from __future__ import annotations

import torch
from support import assert_same, randomise_norms, trace
from torch import Tensor, nn
from torch.nn import functional as F

from fxprune.calibration.layer_matrix import Layer, layers
from fxprune.graph.program import Program
from fxprune.passes import FoldBatchNorm
from fxprune.pipeline.context import Context
from fxprune.reconstruction.region import affine_tail, comparable, cut, slope

X = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """A residual block, and what follows it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.second, self.norm2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.first(x)))
        y = F.relu(self.norm2(self.second(y)) + x)
        return self.head(y.mean((2, 3)).flatten(1))  # type: ignore[no-any-return]


def block() -> tuple[Program, dict[str, Layer]]:
    torch.manual_seed(0)
    program = trace(randomise_norms(Block()).eval(), X)
    return program, {layer.weight: layer for layer in layers(program)}


def names(nodes: tuple[object, ...]) -> list[str]:
    return [str(node) for node in nodes]


def test_an_affine_tail_ends_before_what_is_not() -> None:
    _, found = block()
    assert names(affine_tail(found["first.weight"].node)) == ["conv2d", "batch_norm"]
    tail = affine_tail(found["second.weight"].node)
    assert names(tail) == ["conv2d_1", "batch_norm_1", "add"]
    assert names(affine_tail(found["head.weight"].node)) == ["linear"]


def test_its_slope_is_what_the_norm_multiplies_by() -> None:
    program, found = block()
    tail = affine_tail(found["second.weight"].node)
    variance, gamma = program.tensor("norm2.running_var"), program.tensor("norm2.weight")
    expected = (gamma / (variance + 1e-5).sqrt()).detach().double()
    torch.testing.assert_close(slope(program, tail), expected)
    assert slope(program, tail[:1]) is None
    with torch.no_grad():
        program.tensor("norm2.weight")[1] = 0
    assert bool(slope(program, tail).isinf()[1])  # type: ignore[union-attr]


def test_operations_ahead_are_counted_without_data_movement() -> None:
    program, found = block()
    usable = comparable(program, program.copy())
    region = cut(found["second.weight"], 4, usable)
    assert region is not None
    outputs = ["batch_norm_1", "add", "relu_1", "mean"]
    assert names(region.outputs) == outputs
    region = cut(found["second.weight"], 5, usable)
    assert region is not None
    assert names(region.outputs) == [*outputs, "linear"]
    assert "flatten" in names(region.nodes)


def test_values_before_norms_are_looked_at_behind_them() -> None:
    program, found = block()
    usable = comparable(program, program.copy())
    region = cut(found["first.weight"], 3, usable)
    assert region is not None
    assert names(region.outputs) == ["batch_norm", "relu", "batch_norm_1"]
    region = cut(found["first.weight"], 3, usable, raw=True)
    assert region is not None
    assert names(region.outputs) == ["conv2d", "batch_norm", "relu", "conv2d_1"]


def test_a_region_runs_from_the_values_before_its_layer() -> None:
    program, found = block()
    region = cut(found["first.weight"], 50, comparable(program, program.copy()))
    assert region is not None
    (place,) = (node for node in program.graph.nodes if node.op == "placeholder")
    assert_same(region.run(program, {place: X}, {})[region.outputs[-1]], program(X))
    weight = torch.zeros_like(program.tensor("first.weight"))
    other = region.run(program, {place: X}, {"first.weight": weight})
    assert not torch.equal(other[region.outputs[-1]], program(X))


def test_nodes_that_mean_something_else_are_not_compared() -> None:
    program, _ = block()
    dense = program.copy()
    FoldBatchNorm()(program, Context())
    usable = {node.name for node in comparable(program, dense)}
    assert "conv2d" not in usable
    assert {"add", "relu", "mean", "linear"} <= usable
    first = next(layer for layer in layers(program) if layer.weight == "first.weight")
    assert cut(first, 0, comparable(program, dense)) is None


def test_each_call_of_a_shared_layer_counts() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.layer(F.relu(self.layer(x))))

    program = trace(Shared(), torch.randn(2, 4))
    (layer,) = layers(program)
    usable = comparable(program, program.copy())
    for ahead, outputs in ((0, ["linear", "linear_1"]), (1, ["linear", "relu", "linear_1"])):
        region = cut(layer, ahead, usable)
        assert region is not None
        assert names(region.outputs)[: len(outputs)] == outputs
