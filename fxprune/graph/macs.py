"""Multiply-accumulates of the operators that have them, as products of dimensions.

The records of ``fxprune.graph.operators`` say which operator has which.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from fxprune.graph.node_args import argument, arguments
from fxprune.graph.program import shape_of

Place = tuple[fx.Node, int]  # a node and a dimension of its value


def every_dimension(node: fx.Node) -> tuple[Place, ...]:
    """Return all dimensions of a node's value."""
    return tuple((node, dim) for dim in range(len(shape_of(node))))


def convolution(node: fx.Node) -> list[tuple[Place, ...]]:
    """Every output element reads a kernel of input channels."""
    return [(*every_dimension(node), *every_dimension(argument(node, "weight"))[1:])]


def transposed_convolution(node: fx.Node) -> list[tuple[Place, ...]]:
    """Every input element writes a kernel of output channels."""
    source, weight = argument(node, "input"), argument(node, "weight")
    return [(*every_dimension(source), *every_dimension(weight)[1:])]


def linear(node: fx.Node) -> list[tuple[Place, ...]]:
    """Every output reads all inputs."""
    weight = argument(node, "weight")
    return [(*every_dimension(node), (weight, len(shape_of(weight)) - 1))]


def product(node: fx.Node, first: int = 0) -> list[tuple[Place, ...]]:
    """Every element of a matrix product sums over the last dimension of the left matrix."""
    left = node.args[first]
    assert isinstance(left, fx.Node)
    return [(*every_dimension(node), (left, len(shape_of(left)) - 1))]


def added_product(node: fx.Node) -> list[tuple[Place, ...]]:
    """A matrix product whose first argument is added to it."""
    return product(node, 1)


def bilinear(node: fx.Node) -> list[tuple[Place, ...]]:
    """Every output reads all pairs of inputs."""
    return [(*every_dimension(node), *every_dimension(argument(node, "weight"))[1:])]


def outer(node: fx.Node) -> list[tuple[Place, ...]]:
    """One product for every element."""
    return [every_dimension(node)]


def summed_product(node: fx.Node) -> list[tuple[Place, ...]]:
    """Matrix products that are summed, and added to the first argument."""
    left, right = argument(node, "batch1"), argument(node, "batch2")
    return [(*every_dimension(left), (right, 2))]


def tensordot(node: fx.Node) -> list[tuple[Place, ...]]:
    """Every pair of elements that agree in the dimensions that are summed over."""
    left, right = argument(node, "self"), argument(node, "other")
    rank = len(shape_of(right))
    summed = {dim % rank for dim in argument(node, "dims_other")}
    rest = (place for place in every_dimension(right) if place[1] not in summed)
    return [(*every_dimension(left), *rest)]


def attention(node: fx.Node) -> list[tuple[Place, ...]]:
    """Queries times keys, and weights times values."""
    query, key = argument(node, "query"), argument(node, "key")
    tokens = (key, len(shape_of(key)) - 2)
    return [(*every_dimension(query), tokens), (*every_dimension(node), tokens)]


def einsum(node: fx.Node) -> list[tuple[Place, ...]]:
    """Of two operands: all letters of the equation."""
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


def recurrent(node: fx.Node) -> list[tuple[Place, ...]]:
    """Every matrix of every cell is read at every step of every sample."""
    given = arguments(node)
    operand = given["data" if "data" in given else "input"]
    steps = every_dimension(operand)[:-1]
    matrices = [item for item in given["params"] if len(shape_of(item)) == 2]
    return [(*steps, *every_dimension(matrix)) for matrix in matrices]


def recurrent_cell(node: fx.Node) -> list[tuple[Place, ...]]:
    """One step of a recurrent layer."""
    given = arguments(node)
    samples = every_dimension(given["input"])[:-1]
    return [(*samples, *every_dimension(given[name])) for name in ("w_ih", "w_hh")]
