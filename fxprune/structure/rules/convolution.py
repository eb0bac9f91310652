"""Convolutions: dense, grouped, depthwise, transposed, in one to three dimensions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from fxprune.graph.node_args import argument, arguments, assign
from fxprune.structure.flow import Flow
from fxprune.structure.labels import DimLabels, Labels
from fxprune.structure.reads import NotCovered, Read
from fxprune.structure.rules.record import OperatorRule, Remaining

aten = torch.ops.aten


def convolution(flow: Flow, node: fx.Node) -> Any:
    """Input channels meet the weight's, output channels are the weight's and the bias's.

    A depthwise channel lives and dies with its input. Grouped channels are removable by whole
    groups or by the same offset in every group, whichever is finer.
    """
    given = arguments(node)
    operand, weight = flow.labels(given["input"]), flow.labels(given["weight"])
    transposed = "output_padding" in given
    slid = _freeze_space(flow, node, operand, weight)
    flow.reads[node] = (Read((0,), len(operand.shape) - len(weight.shape) + 1),)
    channel = len(operand.shape) - len(weight.shape) + 1  # an unbatched operand has no batch
    bias = flow.labels(given["bias"]) if isinstance(given["bias"], fx.Node) else None
    groups, wide = given["groups"], 1 if transposed else 0
    if isinstance(groups, fx.Node):
        raise NotCovered("its number of groups depends on the batch")
    if groups == 1:
        flow.align(node, [(operand, channel), (weight, 1 - wide)], channel)
        made = [(weight, wide)]
    else:
        made = [(_grouped(flow, node, operand, weight, channel, groups, transposed), 0)]
    if bias is not None:
        made.append((bias, 0))
    entries = flow.align(node, made, channel)
    kept = tuple(entry for entry in operand.entries if entry.dim < channel)
    return Labels(tuple(node.meta["val"].shape), kept + entries + slid)


def _freeze_space(
    flow: Flow, node: fx.Node, operand: Labels, weight: Labels
) -> tuple[DimLabels, ...]:
    """Fix what the kernel slides along, unless it is channels, as in efficient channel attention.

    There a kernel with padding runs along the channels of a pooled image: it mixes neighbours.
    """
    kernel = [entry for entry in weight.entries if entry.dim > 1]
    flow.freeze(node, kernel, "it is the size of a convolution kernel", silent=True)
    first = len(operand.shape) - len(weight.shape) + 2
    space = [entry for entry in operand.entries if entry.dim >= first]
    given = arguments(node)
    is_same = tuple(node.meta["val"].shape[first:]) == operand.shape[first:]
    if is_same and set(weight.shape[2:]) == {1}:
        return tuple(space)  # every position for itself
    is_line = len(weight.shape) == 3 and is_same and given["stride"] in (1, [1])
    mixed = tuple(entry for entry in space if is_line and not flow.is_factor(entry))
    flow.mix(node, mixed)
    fixed = [entry for entry in space if entry not in mixed]
    flow.freeze(node, fixed, "a convolution slides along it")
    return mixed


def _grouped(
    flow: Flow, node: fx.Node, operand: Labels, weight: Labels, channel: int, groups: int,
    transposed: bool,
) -> Labels:  # fmt: skip
    """Merge the channels of a grouped convolution; returns labels of its output channels."""
    into = operand.shape[channel] // groups
    out = node.meta["val"].shape[channel] // groups
    entering = next(operand.at(channel), None)
    if entering is None:
        flow.freeze(node, [*weight.at(0), *weight.at(1)], "its input channels cannot shrink")
        return Labels((groups * out,))
    rows, columns = next(weight.at(0), None), next(weight.at(1), None)
    made: DimLabels | None
    inner: DimLabels | Tensor | None
    if rows is None:
        flow.freeze(node, [entering], "the weight of this convolution is not a parameter")
        return Labels((groups * out,))
    incoming = entering.ids.view(groups, into)
    if transposed:
        wide = rows.ids.view(groups, into)
        made, inner = columns, wide
    else:
        made, inner = rows, columns
    if groups >= min(into, out):
        return _whole_groups(flow, node, incoming, made, inner, (groups, out))
    return _same_offset(flow, node, incoming, made, inner, (groups, out))


def _whole_groups(
    flow: Flow, node: fx.Node, incoming: Tensor, made: DimLabels | None, inner: Any,
    size: tuple[int, int],
) -> Labels:  # fmt: skip
    """Everything in a group goes together; positions within groups stay."""
    groups, out = size
    flow.merge(node, incoming[:, :1].expand_as(incoming), incoming)
    owner = incoming[:, :1]
    within = "groups of a convolution can only be removed whole"
    if isinstance(inner, DimLabels):  # one dimension of the weight counts positions within a group
        flow.freeze(node, [inner], within, silent=True)
    elif isinstance(inner, Tensor):
        flow.merge(node, owner.expand_as(inner), inner)
    if made is not None and made.ids.numel() == groups * out:
        outgoing = made.ids.view(groups, out)
        flow.merge(node, owner.expand_as(outgoing), outgoing)
    elif made is not None:
        flow.freeze(node, [made], within, silent=True)
    ids = owner.expand(groups, out).reshape(-1)
    return Labels((groups * out,), (DimLabels(0, ids),))


def _same_offset(
    flow: Flow, node: fx.Node, incoming: Tensor, made: DimLabels | None, inner: Any,
    size: tuple[int, int],
) -> Labels:  # fmt: skip
    """The same position goes in every group, on either side alone."""
    groups, out = size
    flow.merge(node, incoming[:1].expand_as(incoming), incoming)
    if isinstance(inner, DimLabels):
        flow.merge(node, incoming[0], inner.ids)
    elif isinstance(inner, Tensor):
        flow.merge(node, incoming, inner)
    elif incoming.shape[1] > 1:
        flow.freeze(
            node, [DimLabels(0, incoming[0])], "the weight has no dimension for these channels"
        )
    if made is None:
        return Labels((groups * out,))
    if made.ids.numel() == out:
        return Labels((groups * out,), (DimLabels(0, made.ids.repeat(groups)),))
    outgoing = made.ids.view(groups, out)
    flow.merge(node, outgoing[:1].expand_as(outgoing), outgoing)
    return Labels((groups * out,), (DimLabels(0, outgoing[:1].expand_as(outgoing).reshape(-1)),))


def _convolution(node: fx.Node, remaining: Remaining) -> None:
    groups = argument(node, "groups")
    channel = len(remaining.before[0]) - len(node.args[1].meta["val"].shape) + 1  # type: ignore[union-attr]
    mask = remaining.operand(node.args[0]).get(channel)
    if groups == 1 or mask is None:
        return
    assign(node, "groups", int(mask.view(groups, -1).any(1).sum()))


RULES: dict[Any, OperatorRule] = {
    getattr(aten, f"{name}{extent}"): OperatorRule(convolution, _convolution)
    for name in ("conv", "conv_transpose")
    for extent in ("1d", "2d", "3d")
}
