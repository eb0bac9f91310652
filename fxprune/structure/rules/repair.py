"""Literals that a trace baked in, brought in line after removal: sizes, splits, groups.

Each repair is given the arguments of a call and what remains of every dimension, and rewrites the
arguments in place. Operators without a repair have no such literal.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from fxprune.graph.node_args import CONVOLUTIONS, argument, assign
from fxprune.structure.rules.positions import POSITIONS, Remains, Repair

__all__ = ["REPAIRS", "Remains", "Repair"]

aten = torch.ops.aten


def _sizes(position: int, *, inferred: bool = True) -> Repair:
    """A list of the output's sizes at an argument position."""

    def repair(node: fx.Node, remains: Remains) -> None:
        sizes: list[Any] = list(node.args[position])  # type: ignore[arg-type]
        offset = len(remains.before[0]) - len(sizes)
        for number, size in enumerate(sizes):
            dim = number + offset
            if dim not in remains.kept[0]:
                continue
            if isinstance(size, int) and size != -1:
                sizes[number] = remains.size(dim)
            elif isinstance(size, fx.Node) and inferred:  # a symbolic product, such as batch*heads
                if -1 in sizes:  # only one size can be inferred, and the batch is in this one
                    other = sizes.index(-1)
                    sizes[other] = remains.size(other + offset)
                sizes[number] = -1
        node.update_arg(position, sizes)

    return repair


def _unflatten(node: fx.Node, remains: Remains) -> None:
    sizes: list[Any] = list(node.args[2])  # type: ignore[arg-type]
    first = int(node.args[1]) % node.args[0].meta["val"].dim()  # type: ignore[union-attr, arg-type]
    for number, size in enumerate(sizes):
        if first + number in remains.kept[0] and isinstance(size, int) and size != -1:
            sizes[number] = remains.size(first + number)
    node.update_arg(2, sizes)


def _split(node: fx.Node, remains: Remains) -> None:
    dim = argument(node, "dim") % len(remains.before[0])
    sizes = [remains.size(dim, piece) for piece in range(len(remains.before))]
    if any(dim in kept for kept in remains.kept):
        node.update_arg(1, sizes)


def _pad(node: fx.Node, remains: Remains) -> None:
    amounts: list[Any] = list(node.args[1])  # type: ignore[arg-type]
    rank = len(remains.before[0])
    for dim, mask in remains.kept[0].items():
        position = 2 * (rank - 1 - dim)
        if position >= len(amounts):
            continue
        before, after = amounts[position : position + 2]
        if before > 0:
            amounts[position] = int(mask[:before].sum())
        if after > 0:
            amounts[position + 1] = int(mask[mask.numel() - after :].sum())
        source = remains.operand(node.args[0]).get(dim)
        if before < 0:
            amounts[position] = -_lost(source, -before, leading=True)
        if after < 0:
            amounts[position + 1] = -_lost(source, -after, leading=False)
    node.update_arg(1, amounts)


def _lost(mask: Tensor | None, count: int, *, leading: bool) -> int:
    if mask is None:
        return count
    return int((mask[:count] if leading else mask[mask.numel() - count :]).sum())


def _normalized_shape(node: fx.Node, remains: Remains) -> None:
    shape: list[Any] = list(node.args[1])  # type: ignore[arg-type]
    rank = len(remains.before[0])
    node.update_arg(1, [remains.size(rank - len(shape) + number) for number in range(len(shape))])


def _group_norm(node: fx.Node, remains: Remains) -> None:
    groups, mask = int(node.args[1]), remains.kept[0].get(1)  # type: ignore[arg-type]
    if mask is not None:
        node.update_arg(1, int(mask.view(groups, -1).any(1).sum()))


def _convolution(node: fx.Node, remains: Remains) -> None:
    groups = argument(node, "groups")
    channel = len(remains.before[0]) - len(node.args[1].meta["val"].shape) + 1  # type: ignore[union-attr]
    mask = remains.operand(node.args[0]).get(channel)
    if groups == 1 or mask is None:
        return
    assign(node, "groups", int(mask.view(groups, -1).any(1).sum()))


def _attention(node: fx.Node, remains: Remains) -> None:
    width = node.args[0].meta["val"].shape[-1]  # type: ignore[union-attr]
    rank = len(remains.before[0])
    if argument(node, "scale") is None and rank - 1 in remains.operand(node.args[0]):
        node.update_kwarg("scale", 1.0 / math.sqrt(width))


def _full(node: fx.Node, remains: Remains) -> None:
    position = 1 if "new_" in str(node.target) else 0
    _sizes(position, inferred=False)(node, remains)


def _repeat(node: fx.Node, remains: Remains) -> None:
    """Only dimensions of size one that were repeated carry a literal."""
    times: list[Any] = list(node.args[1])  # type: ignore[arg-type]
    shape = node.args[0].meta["val"].shape  # type: ignore[union-attr]
    offset = len(times) - len(shape)
    for dim in remains.kept[0]:
        if dim < offset or shape[dim - offset] == 1:
            times[dim] = remains.size(dim)
    node.update_arg(1, times)


REPAIRS: dict[Any, Repair] = {
    **POSITIONS,
    aten.view: _sizes(1),
    aten.reshape: _sizes(1),
    aten._unsafe_view: _sizes(1),
    aten.expand: _sizes(1, inferred=False),
    aten.broadcast_to: _sizes(1, inferred=False),
    aten.repeat: _repeat,
    aten.unflatten: _unflatten,
    aten.split_with_sizes: _split,
    aten.pad: _pad,
    aten.constant_pad_nd: _pad,
    aten.layer_norm: _normalized_shape,
    aten.rms_norm: _normalized_shape,
    aten.group_norm: _group_norm,
    aten.scaled_dot_product_attention: _attention,
    **dict.fromkeys(CONVOLUTIONS, _convolution),
    **{
        getattr(aten, name): _full
        for name in ("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full",
                     "new_empty")
    },
}  # fmt: skip
