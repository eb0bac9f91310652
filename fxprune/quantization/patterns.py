"""Operators that ONNX Runtime's CPU kernels run in INT8, and so where a program is quantised.

The table was taken from the optimised graphs of ONNX Runtime 1.20 to 1.31 on x64. Other operators
run in FP32; behind a quantised operator, their input is dequantised.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxprune.graph.node_args import argument, arguments, packet_of
from fxprune.graph.operators import operator_of
from fxprune.graph.program import Program, shape_of

aten = torch.ops.aten


@dataclass(frozen=True)
class Pattern:
    """One kind of node that can run in INT8.

    Attributes:
        onnx: the ONNX operator that the runtime fuses with the conversions around it.
        operators: its operators in a program.
        weight: which argument is a stored weight; None if all tensors are activations.
        output: whether it fuses only if its output, after a clamp at most, is quantised too.
        follows: whether it runs in INT8 if and only if all its inputs are in INT8 already. A node
            that neither follows nor has a weight runs in INT8 only if chosen.

    """

    onnx: str
    operators: tuple[Any, ...]
    weight: int | None = None
    output: bool = True
    follows: bool = False


BACKEND: tuple[Pattern, ...] = (
    Pattern("Conv", (aten.conv1d, aten.conv2d, aten.conv3d), weight=1),
    Pattern("Gemm", (aten.linear,), weight=1, output=False),
    Pattern("MatMul", (aten.matmul, aten.bmm), output=False),
    Pattern("Sigmoid", (aten.sigmoid,)),
    Pattern("Mul", (aten.mul,)),
    Pattern("Add", (aten.add,), follows=True),
    Pattern("Concat", (aten.cat,), follows=True),
    Pattern("AveragePool", (aten.avg_pool2d, aten.adaptive_avg_pool2d), follows=True),
)


def pattern_of(node: fx.Node) -> Pattern | None:
    """Return the pattern that a node matches."""
    packet = packet_of(node)
    pattern = next((item for item in BACKEND if packet in item.operators), None)
    if pattern is None or not _suits(node, pattern):
        return None
    return pattern


def _suits(node: fx.Node, pattern: Pattern) -> bool:
    if pattern.weight is not None:
        return True
    inputs = list(sources(node))
    if pattern.onnx == "Sigmoid":
        return len(inputs) == 1 and inputs[0].op == "call_function"
    if not pattern.follows:  # a product of activations
        return len(set(inputs)) == 2 and all(item.op == "call_function" for item in inputs)
    if packet_of(node) is aten.add:
        return len(inputs) == 2 and argument(node, "alpha") == 1 and len(set(inputs)) == 2
    if pattern.onnx == "Concat":
        return _joins_signs(node)
    if packet_of(node) is aten.adaptive_avg_pool2d:
        return shape_of(node)[-2:] == (1, 1)
    return True


def sources(node: fx.Node) -> Iterator[fx.Node]:
    """Yield the activations that a pattern or a move reads."""
    pattern = next((item for item in BACKEND if packet_of(node) in item.operators), None)
    if pattern is not None and pattern.weight is not None:
        yield node.args[0]  # type: ignore[misc]  # the input of a layer is a node
        return
    for item in node.all_input_nodes:
        value = item.meta.get("val")
        if isinstance(value, Tensor) and value.is_floating_point():
            yield item


def is_product(node: fx.Node) -> bool:
    """Whether a node is a matrix product of two activations, as in attention."""
    pattern = pattern_of(node)
    return pattern is not None and pattern.onnx == "MatMul"


def is_chosen_alone(node: fx.Node) -> bool:
    """Whether a node without a weight runs in INT8 only if chosen.

    Sums follow their operands, unless one of them is a stored number.
    """
    pattern = pattern_of(node)
    if pattern is None or pattern.weight is not None:
        return False
    return not pattern.follows or any(source.op == "get_attr" for source in sources(node))


def has_weight(node: fx.Node) -> bool:
    """Whether a node is a layer with a weight that can run in INT8."""
    pattern = pattern_of(node)
    return pattern is not None and pattern.weight is not None


def weight_name(layer: fx.Node) -> str:
    """Return the name of a layer's stored weight."""
    weight = layer.args[1]
    assert isinstance(weight, fx.Node)
    return str(weight.target)


def is_move(node: fx.Node) -> bool:
    """Whether a node only moves its input, so that it runs on INT8 values as well."""
    known = operator_of(node)
    passes = known.moves_data or packet_of(node) in (aten.cat, aten.max_pool2d)
    if not passes or not isinstance(node.meta.get("val"), Tensor):
        return False
    if known.kind == "pad":
        given = arguments(node)
        return given.get("mode", "constant") != "constant" or not given.get("value")
    return packet_of(node) is not aten.cat or not _joins_signs(node)


def _joins_signs(concat: fx.Node) -> bool:
    """Whether some of the joined values are clamped at zero and others are not.

    With one scale for both the clamps would no longer vanish into it.
    """
    return len({_is_floor_at_zero(origin(part)) for part in sources(concat)}) > 1


def origin(node: fx.Node) -> fx.Node:
    """Return the node whose value reaches this one by moves alone; for concats, the first part."""
    while is_move(node):
        source = next(sources(node), None)
        if source is None:  # a value whose type is not known yet
            break
        node = source
    return node


def is_depthwise(node: fx.Node) -> bool:
    """Whether a layer is a depthwise convolution."""
    groups: int = arguments(node).get("groups", 1)
    return groups > 1 and shape_of(node.args[1])[1] == 1  # type: ignore[arg-type]


def sums_exactly(node: fx.Node) -> bool:
    """Whether sums of 8-bit products do not overflow on any processor, because of special kernels.

    Such kernels exist for convolutions with one input and one output channel per group.
    """
    return is_depthwise(node) and arguments(node)["groups"] == shape_of(node.args[1])[0]  # type: ignore[arg-type]


def tail(node: fx.Node) -> fx.Node:
    """Return the last of the clamps and scalings that are a node's only readers, or the node."""
    while len(node.users) == 1:
        user = next(iter(node.users))
        if not _is_floor_at_zero(user) and factor_of(user) is None:
            break
        node = user
    return node


def factor_of(node: fx.Node) -> float | None:
    """Return the positive constant by which a node multiplies its only operand, or None.

    Such a factor becomes part of the scale of the quantised result.
    """
    if packet_of(node) not in (aten.mul, aten.div) or len(node.all_input_nodes) != 1:
        return None
    number = node.args[1]
    if not isinstance(number, (int, float)) or number <= 0 or node.kwargs:
        return None
    return float(number) if packet_of(node) is aten.mul else 1 / number


def _is_floor_at_zero(node: fx.Node) -> bool:
    match packet_of(node):
        case aten.relu | aten.relu6:
            return True
        case aten.hardtanh:
            return bool(argument(node, "min_val") == 0)
        case aten.clamp | aten.clamp_min:
            return bool(argument(node, "min") == 0)
    return False


@dataclass(frozen=True)
class Placement:
    """Where values become INT8.

    Attributes:
        layers: nodes with weights that will run in INT8.
        others: other nodes that will run in INT8.
        roots: by value that is quantised, the readers of the quantised value.
        keys: by such value, the name of its scale; values that meet in a move share one.

    """

    layers: tuple[fx.Node, ...]
    others: tuple[fx.Node, ...]
    roots: Mapping[fx.Node, tuple[fx.Node, ...]]
    keys: Mapping[fx.Node, str]


def place(program: Program, layers: frozenset[fx.Node]) -> Placement:
    """Decide which values are quantised, so that these layers and the nodes between them fuse.

    Products of activations run in INT8 if they are among the layers.
    """
    quantized: set[fx.Node] = set()  # values of fused nodes, and moves of them
    read: dict[fx.Node, list[fx.Node]] = {}  # by value, the nodes that read it in INT8
    others = []
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        pattern = pattern_of(node)
        int8 = node in layers
        if not int8 and pattern is not None and pattern.weight is None and pattern.follows:
            int8 = all(source in quantized for source in sources(node))
        if pattern is not None and int8:
            others += [] if pattern.weight is not None else [node]
            for source in sources(node):
                read.setdefault(source, []).append(node)
            if pattern.output:
                quantized.add(tail(node))
        elif is_move(node) and all(source in quantized for source in sources(node)):
            quantized.add(node)
    return _rooted(program, layers, tuple(others), quantized, read)


def _rooted(
    program: Program,
    layers: frozenset[fx.Node],
    others: tuple[fx.Node, ...],
    quantized: set[fx.Node],
    read: dict[fx.Node, list[fx.Node]],
) -> Placement:
    """Trace every value that is read in INT8 back through moves to where it is computed."""

    def moves(node: fx.Node) -> bool:
        return is_move(node) and (packet_of(node) is not aten.cat or node in quantized)

    for node in reversed(list(program.graph.nodes)):
        if node in read and moves(node):
            for source in sources(node):
                read.setdefault(source, []).append(node)
    order = [node for node in program.graph.nodes if node in read or node in quantized]
    roots = [node for node in order if not moves(node)]
    parent = {node: node for node in order}

    def find(node: fx.Node) -> fx.Node:
        above: fx.Node = parent[node]
        return node if above is node else find(above)

    for node in order:
        if moves(node) and node in read:
            first, *rest = [find(source) for source in sources(node)]
            parent[node] = first
            for other in rest:
                parent[find(other)] = find(first)
    return Placement(
        tuple(node for node in program.graph.nodes if node in layers and has_weight(node)),
        others,
        {node: tuple(node.users) if node in quantized else tuple(read[node]) for node in roots},
        {node: find(node).name for node in roots},
    )
