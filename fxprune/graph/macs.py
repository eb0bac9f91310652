"""Multiply-accumulates of every operator that has them, as products of dimensions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from fxprune.graph.node_args import CONVOLUTIONS, argument
from fxprune.graph.program import shape_of

aten = torch.ops.aten
Place = tuple[fx.Node, int]  # a node and a dimension of its value


def every_dimension(node: fx.Node) -> tuple[Place, ...]:
    """Return all dimensions of a node's value."""
    return tuple((node, dim) for dim in range(len(shape_of(node))))


def _convolution(node: fx.Node) -> list[tuple[Place, ...]]:
    weight = argument(node, "weight")
    transposed = "transpose" in str(node.target)
    positions = argument(node, "input") if transposed else node
    return [(*every_dimension(positions), *every_dimension(weight)[1:])]


def _linear(node: fx.Node) -> list[tuple[Place, ...]]:
    return [(*every_dimension(node), (argument(node, "weight"), len(shape_of(node.args[1])) - 1))]  # type: ignore[arg-type]


def _product(first: int) -> Callable[[fx.Node], list[tuple[Place, ...]]]:
    def places(node: fx.Node) -> list[tuple[Place, ...]]:
        left = node.args[first]
        assert isinstance(left, fx.Node)
        return [(*every_dimension(node), (left, len(shape_of(left)) - 1))]

    return places


def _attention(node: fx.Node) -> list[tuple[Place, ...]]:
    query, key = node.args[0], node.args[1]
    assert isinstance(query, fx.Node)
    assert isinstance(key, fx.Node)
    tokens = (key, len(shape_of(key)) - 2)
    return [(*every_dimension(query), tokens), (*every_dimension(node), tokens)]


def _einsum(node: fx.Node) -> list[tuple[Place, ...]]:
    sources: Sequence[Any] = node.args[1]  # type: ignore[assignment]
    if len(sources) != 2:
        return []
    operands = str(node.args[0]).replace(" ", "").partition("->")[0].split(",")
    found: dict[str, Place] = {}
    for term, source in zip(operands, sources, strict=True):
        rank = len(shape_of(source))
        dots = "0123456789"[: rank - len(term.replace("...", ""))]
        for dim, letter in enumerate(term.replace("...", dots)):
            if letter not in found or shape_of(source)[dim] > 1:  # sizes of one broadcast
                found[letter] = (source, dim)
    return [tuple(found.values())]


def _recurrent(node: fx.Node) -> list[tuple[Place, ...]]:
    operand, parameters = node.args[0], node.args[2]
    assert isinstance(operand, fx.Node)
    matrices = [item for item in parameters if len(shape_of(item)) == 2]  # type: ignore[union-attr, arg-type]
    return [((operand, 0), (operand, 1), *every_dimension(matrix)) for matrix in matrices]  # type: ignore[arg-type]


# Matrix products, and which argument the left matrix is.
PRODUCTS = {aten.matmul: 0, aten.mm: 0, aten.bmm: 0, aten.addmm: 1, aten.baddbmm: 1}
MACS: dict[Any, Callable[[fx.Node], list[tuple[Place, ...]]]] = {
    **dict.fromkeys(CONVOLUTIONS, _convolution),
    **{packet: _product(first) for packet, first in PRODUCTS.items()},
    aten.linear: _linear,
    aten.einsum: _einsum,
    aten.scaled_dot_product_attention: _attention,
    aten.lstm: _recurrent,
    aten.gru: _recurrent,
    aten.rnn_tanh: _recurrent,
    aten.rnn_relu: _recurrent,
}
