"""Indexing: what is picked out by number stays, everything else moves."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxprune.flow import Flow, Rule
from fxprune.labels import Labels
from fxprune.rules.movement import replay

aten = torch.ops.aten


def index(flow: Flow, node: fx.Node) -> Any:
    """Indexing by numbers fixes the indexed dimensions; the others move."""
    source, indices = flow.labels(node.args[0]), node.args[1]
    return _take(flow, node, source, list(indices))  # type: ignore[arg-type]


def index_select(flow: Flow, node: fx.Node) -> Any:
    """``x[:, index]`` along one dimension."""
    source, given = flow.labels(node.args[0]), flow.arguments(node)
    indices: list[Any] = [None] * (given["dim"] % len(source.shape)) + [given["index"]]
    return _take(flow, node, source, indices)


def _take(flow: Flow, node: fx.Node, source: Labels, indices: list[Any]) -> Any:
    """What indexes and what is indexed stay; where the indices point does not matter then."""
    used = [dim for dim, item in enumerate(indices) if item is not None]
    for dim in used:
        flow.freeze(node, source.at(dim), "it is indexed by numbers", silent=True)
        flow.freeze(node, flow.labels(indices[dim]).layers, "it holds indices", silent=True)
    zeros = [
        None if item is None else torch.zeros(_index_shape(item), dtype=torch.long)
        for item in indices
    ]
    rest = Labels(source.shape, source.without(*used))
    return replay(flow, node, rest, lambda ids: aten.index(ids, zeros))


def _index_shape(item: fx.Node) -> tuple[int, ...]:
    return tuple(item.meta["val"].shape)


def select(flow: Flow, node: fx.Node) -> Any:
    """Picking one index fixes the dimension it is picked from."""
    source, given = flow.labels(node.args[0]), flow.arguments(node)
    dim = given["dim"] % len(source.shape)
    flow.freeze(node, source.at(dim), "one index of it is picked out by its number")
    rest = Labels(source.shape, source.without(dim))
    return replay(flow, node, rest, lambda ids: ids.select(dim, 0))


def unbind(flow: Flow, node: fx.Node) -> Any:
    """Taking a dimension apart fixes its size."""
    source, given = flow.labels(node.args[0]), flow.arguments(node)
    dim = given["dim"] % len(source.shape)
    flow.freeze(node, source.at(dim), "it is taken apart index by index")
    rest = Labels(source.shape, source.without(dim))
    return replay(flow, node, rest, lambda ids: ids.unbind(dim))


RULES: dict[Any, Rule] = {
    aten.index: index,
    aten.index_select: index_select,
    aten.select: select,
    aten.unbind: unbind,
}
