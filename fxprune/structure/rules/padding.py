"""Padding: constants make positions of their own, other modes repeat what is there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from fxprune.graph.node_args import arguments
from fxprune.structure.flow import Flow
from fxprune.structure.labels import DimLabels, Labels
from fxprune.structure.rules.record import OperatorRule, Remaining

aten = torch.ops.aten


def pad(flow: Flow, node: fx.Node) -> Any:
    """Constant padding makes units of its own; their number is a literal of the node."""
    source, shape = flow.labels(node.args[0]), tuple(node.meta["val"].shape)
    amounts = [flow.concrete(amount) for amount in flow.concrete(node.args[1])]
    entries = []
    for entry in source.entries:
        position = 2 * (len(shape) - 1 - entry.dim)
        before, after = amounts[position : position + 2] if position < len(amounts) else (0, 0)
        ids = entry.ids[max(-before, 0) : entry.ids.numel() - max(-after, 0)]
        made = flow.literal(node, entry.dim, max(before, 0) + max(after, 0))
        sides = made[: max(before, 0)], made[max(before, 0) :]
        entries.append(DimLabels(entry.dim, torch.cat([sides[0], ids, sides[1]])))
    return Labels(shape, tuple(entries))


def pad_mirrored(flow: Flow, node: fx.Node) -> Any:
    """Reflection, replication and wrapping read other positions: the padded dimensions stay."""
    source = flow.labels(node.args[0])
    amounts = flow.concrete(node.args[1])
    padded = {-1 - position // 2 for position, amount in enumerate(amounts) if amount}
    for dim in padded:
        flow.freeze(node, source.at(dim), "padding repeats its positions")
    return Labels(tuple(node.meta["val"].shape), source.without(*padded))


def pad_any(flow: Flow, node: fx.Node) -> Any:
    """Padding whose mode is an argument."""
    mode = arguments(node)["mode"]
    if mode == "constant":
        return pad(flow, node)
    return pad_mirrored(flow, node)


def _pad(node: fx.Node, remaining: Remaining) -> None:
    amounts: list[Any] = list(node.args[1])  # type: ignore[arg-type]
    rank = len(remaining.before[0])
    for dim, mask in remaining.kept[0].items():
        position = 2 * (rank - 1 - dim)
        if position >= len(amounts):
            continue
        before, after = amounts[position : position + 2]
        if before > 0:
            amounts[position] = int(mask[:before].sum())
        if after > 0:
            amounts[position + 1] = int(mask[mask.numel() - after :].sum())
        source = remaining.operand(node.args[0]).get(dim)
        if before < 0:
            amounts[position] = -_lost(source, -before, leading=True)
        if after < 0:
            amounts[position + 1] = -_lost(source, -after, leading=False)
    node.update_arg(1, amounts)


def _lost(mask: Tensor | None, count: int, *, leading: bool) -> int:
    if mask is None:
        return count
    return int((mask[:count] if leading else mask[mask.numel() - count :]).sum())


_MIRRORED = [
    f"{mode}_pad{extent}d" for mode in ("reflection", "replication") for extent in (1, 2, 3)
]

RULES: dict[Any, OperatorRule] = {
    aten.constant_pad_nd: OperatorRule(pad, _pad),
    aten.pad: OperatorRule(pad_any, _pad),
    **{getattr(aten, name): OperatorRule(pad_mirrored) for name in _MIRRORED},
}
