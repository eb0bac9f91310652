"""Pooling, interpolation, sampling and embedding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from fxprune.graph.operators import packets
from fxprune.structure.flow import Flow, Rule
from fxprune.structure.labels import DimLabels, Labels
from fxprune.structure.rules.record import OperatorRule

aten = torch.ops.aten


def spatial(extent: int) -> Rule:
    """Make the rule of an operator that works on the last ``extent`` dimensions."""

    def rule(flow: Flow, node: fx.Node) -> Any:
        operand = flow.labels(node.args[0])
        dims = range(len(operand.shape) - extent, len(operand.shape))
        inside = [entry for entry in operand.entries if entry.dim in dims]
        flow.freeze(node, inside, "it is a spatial dimension that is pooled or resampled")
        entries = operand.without(*dims)
        value = node.meta["val"]
        if isinstance(value, Tensor):
            return Labels(tuple(value.shape), entries)
        return [Labels(tuple(item.shape), entries) for item in value]

    return rule


def grid_sample(flow: Flow, node: fx.Node) -> Any:
    """Channels pass; positions come from the grid."""
    flow.freeze_all(node, [node.args[1]], "it holds sampling positions")  # type: ignore[list-item]
    operand = flow.labels(node.args[0])
    flow.freeze(node, operand.without(1), "it is sampled as space")
    return Labels(tuple(node.meta["val"].shape), tuple(operand.at(1)))


def embedding(flow: Flow, node: fx.Node) -> Any:
    """Rows are looked up by number and stay; the width is removable."""
    table = flow.labels(node.args[0])
    flow.freeze(node, table.at(0), "an embedding looks up its rows by index", silent=True)
    flow.freeze(node, flow.labels(node.args[1]).entries, "it holds indices to look up", silent=True)
    shape = tuple(node.meta["val"].shape)
    return Labels(shape, tuple(DimLabels(len(shape) - 1, entry.ids) for entry in table.at(1)))


def embedding_bag(flow: Flow, node: fx.Node) -> Any:
    """Sums, means or maxima of rows of a table; the width is removable."""
    table = flow.labels(node.args[0])
    flow.freeze(node, table.at(0), "rows of an embedding are looked up by number", silent=True)
    flow.freeze_all(node, node.all_input_nodes[1:], "it says what to look up")
    bags, *rest = (Labels(tuple(value.shape)) for value in node.meta["val"])
    entries = tuple(DimLabels(1, entry.ids) for entry in table.at(1))
    return [Labels(bags.shape, entries), *rest]


POOLS = (
    "avg_pool{0}d max_pool{0}d adaptive_avg_pool{0}d adaptive_max_pool{0}d"
    " max_pool{0}d_with_indices lp_pool{0}d _adaptive_avg_pool{0}d"
    " upsample_nearest{0}d _upsample_nearest_exact{0}d"
)
RESAMPLED = {
    1: "upsample_linear1d",
    2: "upsample_bilinear2d _upsample_bilinear2d_aa upsample_bicubic2d _upsample_bicubic2d_aa",
    3: "upsample_trilinear3d",
}

RULES: dict[Any, OperatorRule] = {
    **{
        packet: OperatorRule(spatial(extent))
        for extent in (1, 2, 3)
        for packet in packets(f"{POOLS.format(extent)} {RESAMPLED[extent]}")
    },
    **dict.fromkeys((aten.grid_sampler, aten.grid_sampler_2d), OperatorRule(grid_sample)),
    aten.embedding: OperatorRule(embedding),
    aten.embedding_bag: OperatorRule(embedding_bag),
}
