"""The operators of a program that are timed in ONNX Runtime, and the sizes that times depend on.

Convolutions, linear layers and matrix products are layers; attention is two matrix products.
Element-wise operators, concatenations and global averages have times of their own too, in FP32 and
in INT8. The time of any other operator is assumed proportional to the elements that it computes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx

from fxprune.graph import operators
from fxprune.graph.macs import Place
from fxprune.graph.node_args import argument, packet_of, paddings, spread
from fxprune.graph.program import Program, shape_of

aten = torch.ops.aten
Kind = Literal[
    "conv", "conv-transpose", "linear", "matmul",
    "sigmoid", "silu", "hard-sigmoid", "hard-swish", "gelu", "add", "mul", "concat", "average",
    "quantize", "dequantize", "transpose",
]  # fmt: skip
LAYERS: tuple[Kind, ...] = ("conv", "conv-transpose", "linear", "matmul")
BINARY: tuple[Kind, ...] = ("add", "mul")
PRODUCTS: tuple[operators.Kind, ...] = (
    "convolution", "transposed-convolution", "linear", "product", "attention",
)  # fmt: skip
IMAGE_DIMENSIONS = 4
Dim = Place | int  # a dimension of a node's value, or a size that never changes


@dataclass(frozen=True)
class Layer:
    """An operator whose time is measured.

    Attributes:
        kind: what it is.
        geometry: what removal does not change: of convolutions spatial sizes, kernel, stride,
            padding, dilation and output padding, each with as many numbers as there are spatial
            dimensions (padding twice as many); of matrix products the number of leading sizes, and
            1 if the right matrix is a weight; of sums and products, 1 for every dimension along
            which the second operand is repeated; of concatenations the joined dimension and the
            number of dimensions.
        dims: of convolutions input channels, output channels, and input channels per group (of
            transposed ones output channels per group); of linear layers rows, inputs, outputs; of
            matrix products the leading sizes, rows, the size summed over, columns; of other
            operators the sizes of one sample's result, and of concatenations all sizes but the
            joined one, then that of every part.

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
    match operators.operator_of(node).kind:
        case "convolution" | "transposed-convolution":
            yield from _convolution(node, batch)
        case "product":
            yield from _product(node, batch)
        case "linear":
            yield from _linear(node, batch)
        case "attention":
            yield from _attention(node, batch)


def operator_of(node: fx.Node, batch: int) -> Layer | None:
    """Return the element-wise operator, concatenation or global average that a node is."""
    packet, value = packet_of(node), node.meta.get("val")
    kind = _KINDS.get(packet)
    if kind is None or not isinstance(value, Tensor) or not value.is_floating_point():
        return None
    if kind in BINARY:
        return _binary(node, kind, batch)
    if kind == "concat":
        return _concat(node, batch)
    if kind == "average":
        (x,) = node.all_input_nodes
        pooled = shape_of(node)[-2:] == (1, 1) and len(shape_of(node)) == 4
        return Layer(kind, (), _sample(x, batch)) if pooled else None
    return Layer(kind, (), _sample(node, batch))


def transpose_of(node: fx.Node, batch: int) -> Layer | None:
    """Return the transpose of an image that stands between its forms; None for other values."""
    value = node.meta.get("val")
    if node.op == "get_attr" or not isinstance(value, Tensor) or not value.is_floating_point():
        return None
    image = value.dim() == IMAGE_DIMENSIONS and value.shape[0] == batch
    return Layer("transpose", (), (1, *((node, dim) for dim in range(1, 4)))) if image else None


def _sample(node: fx.Node, batch: int) -> tuple[Dim, ...]:
    """Return the sizes of one sample of a node's value."""
    shape = shape_of(node)
    rest = tuple((node, dim) for dim in range(1, len(shape)))
    return (_single(shape[0], batch), *rest) if shape else ()


def _binary(node: fx.Node, kind: Kind, batch: int) -> Layer | None:
    """Describe a sum or product whose larger operand has the shape of the result."""
    shape = shape_of(node)
    parts = [shape_of(x) if isinstance(x, fx.Node) else () for x in node.args[:2]]
    parts = [(*[1] * (len(shape) - len(part)), *part) for part in parts]
    smaller = next((parts[1 - n] for n in (0, 1) if parts[n] == tuple(shape)), None)
    if smaller is None:
        return None
    repeated = tuple(int(a != b) for a, b in zip(smaller, shape, strict=True))
    return Layer(kind, repeated, _sample(node, batch))


def _concat(node: fx.Node, batch: int) -> Layer | None:
    rank, parts = len(shape_of(node)), node.all_input_nodes
    axis = int(argument(node, "dim")) % rank
    if axis == 0 or len(parts) != len(node.args[0]):  # type: ignore[arg-type]  # a list of nodes
        return None
    sizes = _sample(node, batch)
    rest = sizes[:axis] + sizes[axis + 1 :]
    return Layer("concat", (axis, rank), (*rest, *((part, axis) for part in parts)))


def others(program: Program) -> Iterator[fx.Node]:
    """Yield the nodes other than layers that compute a tensor at some cost."""
    for node in program.graph.nodes:
        known = operators.operator_of(node)
        if packet_of(node) is None or known.free or known.kind in PRODUCTS:
            continue
        if isinstance(node.meta.get("val"), Tensor):
            yield node


def _convolution(node: fx.Node, batch: int) -> Iterator[Layer]:
    source, weight = argument(node, "input"), argument(node, "weight")
    shape = shape_of(source)
    rank = len(shape_of(weight)) - 2
    kernel = shape_of(weight)[2:]
    transposed = operators.operator_of(node).kind == "transposed-convolution"
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


def _product(node: fx.Node, batch: int) -> Iterator[Layer]:
    first = operators.operator_of(node).left
    left, right = node.args[first], node.args[first + 1]
    assert isinstance(left, fx.Node)
    assert isinstance(right, fx.Node)
    if min(len(shape_of(left)), len(shape_of(right))) > 1:
        yield _matmul(node, left, right, batch, constant=_is_weight(right))


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


_KINDS: dict[Any, Kind] = {
    aten.sigmoid: "sigmoid",
    aten.silu: "silu",
    aten.hardsigmoid: "hard-sigmoid",
    aten.hardswish: "hard-swish",
    aten.gelu: "gelu",
    aten.add: "add",
    aten.mul: "mul",
    aten.cat: "concat",
    aten.adaptive_avg_pool2d: "average",
}
