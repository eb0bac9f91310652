"""Joining tensors along a dimension of theirs, or a new one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from fxprune.graph.node_args import arguments
from fxprune.structure.flow import Flow
from fxprune.structure.labels import DimLabels, Labels
from fxprune.structure.rules.record import OperatorRule

aten = torch.ops.aten


def concatenate(flow: Flow, node: fx.Node) -> Any:
    """Labels join along the dimension and must agree along the others."""
    given = arguments(node)
    sources = [flow.labels(item) for item in given["tensors"]]
    shape = tuple(node.meta["val"].shape)
    dim = (given["dim"] or 0) % len(shape)
    sources = [source for source in sources if len(source.shape) == len(shape)]
    ids = [_joined(flow, node, source, dim) for source in sources]
    entries: tuple[DimLabels, ...] = ()
    if any(part is not None for part in ids):
        none = [torch.zeros(source.shape[dim], dtype=torch.int32) for source in sources]
        parts = [n if part is None else part for n, part in zip(none, ids, strict=True)]
        entries = (DimLabels(dim, torch.cat(parts)),)
    for other in range(len(shape)):
        if other != dim:
            entries += flow.align(node, [(source, other) for source in sources], other)
    return Labels(shape, entries)


def _joined(flow: Flow, node: fx.Node, source: Labels, dim: int) -> Tensor | None:
    entries = list(source.at(dim))
    flow.freeze(node, entries[1:], "two labels meet in a concatenation")
    return entries[0].ids if entries else None


def stack(flow: Flow, node: fx.Node) -> Any:
    """Labels must agree along every dimension that was there before."""
    given = arguments(node)
    sources = [flow.labels(item) for item in given["tensors"]]
    shape = tuple(node.meta["val"].shape)
    new = (given["dim"] or 0) % len(shape)
    entries: tuple[DimLabels, ...] = ()
    for dim in range(len(shape) - 1):
        out_dim = dim + (dim >= new)
        entries += flow.align(node, [(source, dim) for source in sources], out_dim)
    return Labels(shape, entries)


RULES: dict[Any, OperatorRule] = {
    **dict.fromkeys((aten.cat, aten.concat), OperatorRule(concatenate)),
    aten.stack: OperatorRule(stack),
}
