"""Pointwise operators, creation of constants, and operators that pass labels through."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from fxprune.graph.node_args import arguments
from fxprune.structure.flow import Flow, Rule
from fxprune.structure.labels import Labels, Layer

aten = torch.ops.aten


def pointwise(flow: Flow, node: fx.Node) -> Any:
    """Identities that meet at an element are merged; dimensions of size one broadcast."""
    shape = tuple(node.meta["val"].shape)
    operands = [flow.labels(source) for source in node.all_input_nodes]
    operands = [labels for labels in operands if labels.shape]
    layers: tuple[Layer, ...] = ()
    for dim in range(len(shape)):
        participants = [
            (labels, dim - len(shape) + len(labels.shape))
            for labels in operands
            if dim - len(shape) + len(labels.shape) >= 0
        ]
        layers += flow.align(node, participants, dim)
    return Labels(shape, layers)


def same(flow: Flow, node: fx.Node) -> Any:
    """The result has the operand's shape and labels."""
    return flow.labels(node.args[0])


def prelu(flow: Flow, node: fx.Node) -> Any:
    """The slope's only dimension is the operand's second."""
    operand, slope = flow.labels(node.args[0]), flow.labels(node.args[1])
    if len(operand.shape) < 2:
        return operand
    layers = flow.align(
        node, [(operand, 1), (slope, 0)] if slope.shape[0] > 1 else [(operand, 1)], 1
    )
    return Labels(operand.shape, operand.without(1) + layers)


def glu(flow: Flow, node: fx.Node) -> Any:
    """The halves of a dimension gate each other."""
    operand, given = flow.labels(node.args[0]), arguments(node)
    dim = given["dim"] % len(operand.shape)
    layers = operand.without(dim)
    for layer in operand.at(dim):
        first, second = layer.ids.chunk(2)
        flow.merge(node, first, second)
        layers += (Layer(dim, first),)
    return Labels(tuple(node.meta["val"].shape), layers)


def uniform(flow: Flow, node: fx.Node) -> Any:
    """A tensor of one value: every dimension may shrink, its size is a literal."""
    value = node.meta["val"]
    if not isinstance(value, Tensor):
        return None
    layers = tuple(
        Layer(dim, flow.literal(node, dim, size))
        for dim, size in enumerate(value.shape)
        if size > 1
    )
    return Labels(tuple(value.shape), layers)


def unlabelled(flow: Flow, node: fx.Node) -> Any:
    """A computed constant, or a value along which nothing is removable."""
    value = node.meta.get("val")
    return Labels(tuple(value.shape)) if isinstance(value, Tensor) else None


SAME = (
    "clone", "contiguous", "detach", "alias", "lift_fresh_copy", "to", "_to_copy", "type_as",
    "dropout", "feature_dropout", "alpha_dropout", "relu6", "selu", "celu", "elu", "gelu", "silu",
    "mish", "hardswish", "hardsigmoid", "hardtanh", "leaky_relu", "softplus", "log_sigmoid",
    "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "empty_like", "triu",
    "tril", "nan_to_num", "rrelu", "bernoulli", "fill", "zero", "float", "half", "double", "long",
    "conj", "resolve_conj", "hardshrink", "softshrink", "tanhshrink", "threshold", "square",
)  # fmt: skip
POINTWISE = ("where", "masked_fill", "lerp", "addcmul", "addcdiv", "clamp", "rsub", "maximum",
             "minimum", "true_divide", "floor_divide", "multiply", "divide",
             "subtract", "copy", "copy_")  # fmt: skip
UNIFORM = ("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty",
           "scalar_tensor")  # fmt: skip
UNLABELLED = ("arange", "linspace", "eye", "rand", "randn", "randint", "tensor", "meshgrid",
              "tril_indices", "triu_indices", "randperm", "hann_window")  # fmt: skip

RULES: dict[Any, Rule] = {
    "pointwise": pointwise,
    **{getattr(aten, name): same for name in SAME if hasattr(aten, name)},
    **{getattr(aten, name): pointwise for name in POINTWISE if hasattr(aten, name)},
    **{getattr(aten, name): uniform for name in UNIFORM if hasattr(aten, name)},
    **{getattr(aten, name): unlabelled for name in UNLABELLED if hasattr(aten, name)},
    aten.prelu: prelu,
    aten._prelu_kernel: pointwise,
    aten.glu: glu,
}
