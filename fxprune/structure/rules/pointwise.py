"""Pointwise operators, creation of constants, and operators that pass labels through."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from fxprune.graph.node_args import arguments
from fxprune.graph.operators import packets
from fxprune.structure.flow import Flow
from fxprune.structure.labels import DimLabels, Labels
from fxprune.structure.rules.record import OperatorRule, Remaining

aten = torch.ops.aten


def pointwise(flow: Flow, node: fx.Node) -> Any:
    """Identities that meet at an element are merged; dimensions of size one broadcast."""
    shape = tuple(node.meta["val"].shape)
    operands = [flow.labels(source) for source in node.all_input_nodes]
    operands = [labels for labels in operands if labels.shape]
    entries: tuple[DimLabels, ...] = ()
    for dim in range(len(shape)):
        participants = [
            (labels, dim - len(shape) + len(labels.shape))
            for labels in operands
            if dim - len(shape) + len(labels.shape) >= 0
        ]
        entries += flow.align(node, participants, dim)
    return Labels(shape, entries)


def same(flow: Flow, node: fx.Node) -> Any:
    """The result has the operand's shape and labels."""
    return flow.labels(node.args[0])


def triangle(flow: Flow, node: fx.Node) -> Any:
    """What is zeroed is chosen by row and column numbers, so both stay."""
    operand = flow.labels(node.args[0])
    flow.freeze(node, [*operand.at(-1), *operand.at(-2)], "a triangle of it is set to zero")
    return Labels(operand.shape, operand.without(-1, -2))


def prelu(flow: Flow, node: fx.Node) -> Any:
    """The slope's only dimension is the operand's second."""
    operand, slope = flow.labels(node.args[0]), flow.labels(node.args[1])
    if len(operand.shape) < 2 or not slope.shape:
        return operand
    entries = flow.align(node, [(operand, 1), (slope, 0)], 1)
    return Labels(operand.shape, operand.without(1) + entries)


def glu(flow: Flow, node: fx.Node) -> Any:
    """The halves of a dimension gate each other."""
    operand, given = flow.labels(node.args[0]), arguments(node)
    dim = given["dim"] % len(operand.shape)
    entries = operand.without(dim)
    for entry in operand.at(dim):
        first, second = entry.ids.chunk(2)
        flow.merge(node, first, second)
        entries += (DimLabels(dim, first),)
    return Labels(tuple(node.meta["val"].shape), entries)


def uniform(flow: Flow, node: fx.Node) -> Any:
    """A tensor of one value: every dimension may shrink with the size that it is given."""
    shape = tuple(node.meta["val"].shape)
    sizes: list[Any] = list(node.args[_size_argument(node)])  # type: ignore[arg-type]
    entries: tuple[DimLabels, ...] = ()
    for dim, (given, size) in enumerate(zip(sizes, shape, strict=True)):
        entries += flow.sized(node, dim, given, size)
    return Labels(shape, entries)


def _size_argument(node: fx.Node) -> int:
    """Which argument the sizes are: the second where the first is a tensor of the same type."""
    return 1 if isinstance(node.args[0], fx.Node) else 0


def unlabelled(flow: Flow, node: fx.Node) -> Any:
    """A computed constant; what it is computed from must stay as it is."""
    value = node.meta.get("val")
    flow.freeze_all(node, node.all_input_nodes, "its size or its values make others")
    return Labels(tuple(value.shape)) if isinstance(value, Tensor) else None


def _full(node: fx.Node, remaining: Remaining) -> None:
    position = _size_argument(node)
    sizes: list[Any] = list(node.args[position])  # type: ignore[arg-type]
    for dim in remaining.kept[0]:
        sizes[dim] = remaining.resized(node, sizes[dim], dim)
    node.update_arg(position, sizes)


SAME = (
    "clone contiguous detach alias lift_fresh_copy to _to_copy type_as dropout feature_dropout"
    " alpha_dropout relu6 selu celu elu gelu silu mish hardswish hardsigmoid hardtanh"
    " leaky_relu softplus log_sigmoid zeros_like ones_like full_like rand_like randn_like"
    " empty_like nan_to_num rrelu bernoulli fill zero conj resolve_conj hardshrink softshrink"
    " threshold square"
)
UNIFORM = "zeros ones full empty new_zeros new_ones new_full new_empty"
UNLABELLED = (
    "arange linspace logspace eye rand randn randint tensor scalar_tensor meshgrid tril_indices"
    " triu_indices randperm hann_window hamming_window blackman_window bartlett_window"
)

RULES: dict[Any, OperatorRule] = {
    **dict.fromkeys(packets(SAME), OperatorRule(same)),
    **dict.fromkeys(packets(UNIFORM), OperatorRule(uniform, _full)),
    **dict.fromkeys(packets(UNLABELLED), OperatorRule(unlabelled)),
    aten.prelu: OperatorRule(prelu),
    aten.glu: OperatorRule(glu),
    **dict.fromkeys((aten.triu, aten.tril), OperatorRule(triangle)),
}
