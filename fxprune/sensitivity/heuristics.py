"""Scores that need no derivatives: magnitudes, batch-norm scales, activations, chance."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from fxprune.data.batches import Batch
from fxprune.graph.hooks import Call, visit
from fxprune.graph.operators import operator_of
from fxprune.graph.program import Program, shape_of
from fxprune.sensitivity.units import UnitLayout

aten = torch.ops.aten


def magnitude(program: Program, layout: UnitLayout, power: int) -> Tensor:
    """Return the L1 (``power`` 1) or L2 norm of all that dies with a unit, over its group's mean.

    Norms of different layers have different units; dividing by the mean makes them comparable.
    """
    values = {name: program.tensor(name).detach().abs() ** power for name in layout.labels}
    return _over_mean(layout, layout.sums(values) ** (1 / power))


def norm_scale(program: Program, layout: UnitLayout) -> tuple[Tensor, Tensor]:
    """Return the mean |gamma| of the batch norms of each unit, and which units have one."""
    scales = {
        str(node.args[1].target)
        for node in program.graph.nodes
        if node.target is aten.batch_norm.default
        and isinstance(node.args[1], fx.Node)
        and node.args[1].op == "get_attr"
    }
    tensors = {name: program.tensor(name).detach() for name in layout.labels}
    gammas = {n: t.abs() if n in scales else torch.zeros_like(t) for n, t in tensors.items()}
    ones = {n: torch.full_like(t, float(n in scales)) for n, t in tensors.items()}
    counts = layout.sums(ones)
    return layout.sums(gammas) / counts.clamp(min=1), counts > 0


def activation(program: Program, layout: UnitLayout, batches: Iterable[Batch]) -> Tensor:
    """Return the sum of |weight| times the root mean square of what it multiplies, over the mean.

    The score of Wanda, summed over every weight of convolutions and linear layers that dies with
    the unit; Sun et al., "A Simple and Effective Pruning Approach for Large Language Models".
    """
    squares: dict[fx.Node, Tensor] = {}
    count = 0
    products = [
        node
        for node in program.graph.nodes
        if operator_of(node).weight_outputs == 0
        and isinstance(node.args[1], fx.Node)
        and node.args[1].op == "get_attr"
    ]

    def square_inputs(call: Call) -> Any:
        operand = call.args[0]
        channel = _channel(call.node, operand.dim())
        others = [dim for dim in range(operand.dim()) if dim != channel]
        square = operand.float().square().mean(others) * len(batch)
        squares[call.node] = squares.get(call.node, 0.0) + square
        return call.value()

    for batch in batches:
        with torch.no_grad():
            visit(program, batch.inputs, dict.fromkeys(products, square_inputs))
        count += len(batch)
    values = {name: torch.zeros_like(program.tensor(name)) for name in layout.labels}
    for node, square in squares.items():
        weight = node.args[1]
        assert isinstance(weight, fx.Node)
        if (name := str(weight.target)) in values:
            values[name] += program.tensor(name).detach().abs() * _inputs(
                (square / count).sqrt(), node, shape_of(weight)
            )
    return _over_mean(layout, layout.sums(values))


def _channel(node: fx.Node, rank: int) -> int:
    if node.target is aten.linear.default:
        return rank - 1
    weight = node.args[1]
    assert isinstance(weight, fx.Node)
    return rank - len(shape_of(weight)) + 1


def _inputs(norms: Tensor, node: fx.Node, shape: tuple[int, ...]) -> Tensor:
    """Lay the norms of the input channels along a weight; groups see their own channels."""
    out, into, *kernel = shape
    groups = len(norms) // into
    by_row = norms.view(groups, into).repeat_interleave(out // groups, 0)
    return by_row.view(out, into, *[1] * len(kernel))


def _over_mean(layout: UnitLayout, scores: Tensor) -> Tensor:
    parts = layout.split(scores).values()
    return torch.cat([part / part.mean().clamp(min=1e-30) for part in parts])


def without(layout: UnitLayout, known: Tensor) -> Mapping[str, str]:
    """Name the groups with a unit that is not known."""
    return {
        name: "no batch norm scales its units"
        for name, part in layout.split(known).items()
        if not bool(part.all())
    }
