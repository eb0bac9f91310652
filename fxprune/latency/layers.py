"""The layers of a program whose time depends on their widths, as ONNX Runtime runs them.

A layer is an operator with its geometry and its dimensions. Convolutions, linear layers and matrix
products are layers; attention is two matrix products. Everything else is told by the elements that
it computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx

from fxprune.graph.macs import PRODUCTS, Place
from fxprune.graph.node_args import CONVOLUTIONS, argument, packet_of, paddings, spread
from fxprune.graph.program import Program, shape_of

aten = torch.ops.aten
Kind = Literal["conv", "conv-transpose", "linear", "matmul"]
Dim = Place | int  # a dimension of a node's value, or a size that never changes

# What moves no data in ONNX Runtime, or is folded into the convolution before it.
FREE = frozenset(
    getattr(aten, name)
    for name in ("view", "reshape", "unsqueeze", "squeeze", "flatten", "unflatten", "detach",
                 "alias", "batch_norm", "dropout", "contiguous", "expand", "t")
)  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """An operator whose time is measured.

    Attributes:
        kind: what it is.
        geometry: what removal does not change: of convolutions spatial sizes, kernel, stride,
            padding, dilation and output padding, each with as many numbers as there are spatial
            dimensions (padding twice as many); of matrix products the number of leading sizes, and
            1 if the right matrix is a weight.
        dims: of convolutions input channels, output channels, and input channels per group (of
            transposed ones output channels per group); of linear layers rows, inputs, outputs; of
            matrix products the leading sizes, rows, the size summed over, columns.

    """

    kind: Kind
    geometry: tuple[int, ...]
    dims: tuple[Dim, ...]


def layers(program: Program, batch: int) -> Iterator[Layer]:
    """Yield the layers of a program for a single sample, of ``batch`` in its example inputs."""
    for node in program.graph.nodes:
        yield from layers_of(node, batch)


def layers_of(node: fx.Node, batch: int) -> Iterator[Layer]:
    """Yield the layers that one node stands for."""
    rule = _RULES.get(packet_of(node))
    if rule is not None:
        yield from rule(node, batch)


def others(program: Program) -> Iterator[fx.Node]:
    """Yield the nodes that compute a tensor at some cost and are no layers."""
    for node in program.graph.nodes:
        packet = packet_of(node)
        if node.op != "call_function" or packet is None or packet in FREE or packet in _RULES:
            continue
        if isinstance(node.meta.get("val"), Tensor):
            yield node


def _convolution(node: fx.Node, batch: int) -> Iterator[Layer]:
    source, weight = argument(node, "input"), argument(node, "weight")
    shape = shape_of(source)
    rank = len(shape_of(weight)) - 2
    kernel = shape_of(weight)[2:]
    transposed = "transpose" in str(node.target)
    dilation = spread(argument(node, "dilation"), rank)
    starts, ends = zip(*paddings(argument(node, "padding"), kernel, dilation), strict=True)
    extra = spread(argument(node, "output_padding") if transposed else 0, rank)
    stride = spread(argument(node, "stride"), rank)
    channels = len(shape) - rank - 1  # zero where the input has no batch
    geometry = (*shape[channels + 1 :], *kernel, *stride, *starts, *ends, *dilation, *extra)
    places = ((source, channels), (node, channels), (weight, 1))
    yield Layer("conv-transpose" if transposed else "conv", geometry, places)


def _linear(node: fx.Node, batch: int) -> Iterator[Layer]:
    weight = argument(node, "weight")
    rows = node.meta["val"].numel() // shape_of(node)[-1]
    yield Layer("linear", (), (_single(rows, batch), (weight, 1), (weight, 0)))


def _single(size: int, batch: int) -> int:
    return size // batch if size % batch == 0 else size


def _product(first: int) -> Callable[[fx.Node, int], Iterator[Layer]]:
    def of(node: fx.Node, batch: int) -> Iterator[Layer]:
        left, right = node.args[first], node.args[first + 1]
        assert isinstance(left, fx.Node)
        assert isinstance(right, fx.Node)
        if min(len(shape_of(left)), len(shape_of(right))) < 2:
            return
        yield _matmul(node, left, right, batch, constant=_is_weight(right))

    return of


def _matmul(
    leading: fx.Node, left: fx.Node, right: fx.Node, batch: int,
    *, constant: bool = False, transposed: bool = False,
) -> Layer:  # fmt: skip
    """Describe ``left @ right``; the leading sizes are those of a node's value."""
    rank = len(shape_of(left))
    rows, inner = (left, rank - 2), (left, rank - 1)
    columns = (right, len(shape_of(right)) - (2 if transposed else 1))
    count = len(shape_of(leading)) - 2
    sizes: list[Dim] = [(leading, dim) for dim in range(count)]
    if count:
        sizes[0] = (leading, 0) if batch == 1 else _single(shape_of(leading)[0], batch)
    return Layer("matmul", (count, int(constant)), (*sizes, rows, inner, columns))


def _is_weight(node: fx.Node) -> bool:
    while node.op == "call_function" and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return node.op == "get_attr"


def _attention(node: fx.Node, batch: int) -> Iterator[Layer]:
    query, key, value = node.args[:3]
    assert isinstance(query, fx.Node)
    assert isinstance(key, fx.Node)
    assert isinstance(value, fx.Node)
    scores = _matmul(node, query, key, batch, transposed=True)
    yield scores
    yield Layer("matmul", scores.geometry, (*scores.dims[:-2], (key, len(shape_of(key)) - 2),
                                            (value, len(shape_of(value)) - 1)))  # fmt: skip


_RULES: dict[Any, Callable[[fx.Node, int], Iterator[Layer]]] = {
    **dict.fromkeys(CONVOLUTIONS, _convolution),
    **{packet: _product(first) for packet, first in PRODUCTS.items()},
    aten.linear: _linear,
    aten.scaled_dot_product_attention: _attention,
}
