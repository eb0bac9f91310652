"""Indexing: what is picked out by a computed number stays, everything else moves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from fxprune.graph.node_args import arguments
from fxprune.graph.surgery import set_tensor
from fxprune.structure.flow import Flow
from fxprune.structure.labels import DimLabels, Labels
from fxprune.structure.reads import NotCovered
from fxprune.structure.rules.movement import replay
from fxprune.structure.rules.record import OperatorRule, Remaining

aten = torch.ops.aten


def index(flow: Flow, node: fx.Node) -> Any:
    """``x[:, index]``, any number of indices, broadcast with each other."""
    source, indices = flow.labels(node.args[0]), node.args[1]
    return _take(flow, node, source, list(indices))  # type: ignore[arg-type]


def index_select(flow: Flow, node: fx.Node) -> Any:
    """``x[:, index]`` along one dimension."""
    source, given = flow.labels(node.args[0]), arguments(node)
    indices: list[Any] = [None] * (given["dim"] % len(source.shape)) + [given["index"]]
    return _take(flow, node, source, indices)


def _take(flow: Flow, node: fx.Node, source: Labels, indices: list[Any]) -> Any:
    """A constant list of indices moves what it indexes; otherwise that stays."""
    used = [dim for dim, item in enumerate(indices) if item is not None]
    if any(indices[dim].meta["val"].dtype in (torch.bool, torch.uint8) for dim in used):
        raise NotCovered("it picks elements by a mask")
    picked: tuple[DimLabels, ...] = ()
    numbers = _constant(flow, indices[used[0]]) if len(used) == 1 else None
    for dim in used:
        own = flow.labels(indices[dim]).entries
        found = list(source.at(dim))
        if numbers is not None and found and own:
            picked = tuple(DimLabels(dim, entry.ids[numbers]) for entry in found)
            for entry in picked:
                flow.merge(node, entry.ids, own[0].ids)
            continue
        is_table = isinstance(node.args[0], fx.Node) and node.args[0].op == "get_attr"
        flow.freeze(node, found, "it is indexed by number", silent=is_table)
        flow.freeze(node, own, "it holds indices", silent=True)
    # Along the dimensions of the indices nothing is labelled: one of each is enough to follow.
    zeros = [
        None if item is None else torch.zeros((1,) * item.meta["val"].dim(), dtype=torch.long)
        for item in indices
    ]
    rest = Labels(source.shape, source.without(*used))
    moved = replay(flow, node, rest, lambda ids: aten.index(ids, zeros))
    return Labels(moved.shape, moved.entries + picked)


def _constant(flow: Flow, item: fx.Node) -> Tensor | None:
    """Return a list of indices that belongs to this call alone, so that it can be renumbered."""
    if item.op != "get_attr" or len(item.users) != 1:
        return None
    tensor = flow.program.tensor(str(item.target))
    shared = sum(other.target == item.target for other in flow.program.tensor_nodes()) > 1
    if shared or tensor.dim() != 1 or tensor.dtype not in (torch.int64, torch.int32):
        return None
    return tensor.detach().cpu().long()


def select(flow: Flow, node: fx.Node) -> Any:
    """The index that is picked stays; its number is a literal."""
    source, given = flow.labels(node.args[0]), arguments(node)
    dim = given["dim"] % len(source.shape)
    number = flow.concrete(given["index"])
    chosen = [DimLabels(0, entry.ids[number].view(1)) for entry in source.at(dim)]
    flow.freeze(node, chosen, "this index is selected by a constant number")
    rest = Labels(source.shape, source.without(dim))
    return replay(flow, node, rest, lambda ids: ids.select(dim, 0))


def gather(flow: Flow, node: fx.Node) -> Any:
    """The gathered dimension stays; along the others the result has the indices' shape."""
    given = arguments(node)
    source, index = flow.labels(given["self"]), flow.labels(given["index"])
    dim = given["dim"] % max(len(source.shape), 1)
    flow.freeze(node, [*source.at(dim), *index.at(dim)], "it is gathered by index")
    entries: tuple[DimLabels, ...] = ()
    for other in range(len(source.shape)):
        if other != dim and source.shape[other] == index.shape[other]:
            entries += flow.align(node, [(source, other), (index, other)], other)
        elif other != dim:
            met = [*source.at(other), *index.at(other)]
            flow.freeze(node, met, "only a part of it is gathered")
    return Labels(index.shape, entries)


def take_along(flow: Flow, node: fx.Node) -> Any:
    """The dimension that is taken from stays; the others broadcast with those of the indices."""
    given = arguments(node)
    source, index = flow.labels(given["self"]), flow.labels(given["indices"])
    if given["dim"] is None:
        raise NotCovered("it runs over all dimensions")
    dim = given["dim"] % len(source.shape)
    flow.freeze(node, [*source.at(dim), *index.at(dim)], "it is gathered by numbers")
    entries: tuple[DimLabels, ...] = ()
    for other in range(len(source.shape)):
        if other != dim:
            entries += flow.align(node, [(source, other), (index, other)], other)
    return Labels(tuple(node.meta["val"].shape), entries)


def bucketize(flow: Flow, node: fx.Node) -> Any:
    """Every number is looked up in a list, whose order matters."""
    values, borders = node.args[:2]
    flow.freeze(node, flow.labels(borders).entries, "its order counts", silent=True)
    return flow.labels(values)


def unbind(flow: Flow, node: fx.Node) -> Any:
    """Taking a dimension apart fixes its size."""
    source, given = flow.labels(node.args[0]), arguments(node)
    dim = given["dim"] % len(source.shape)
    flow.freeze(node, source.at(dim), "it is split index by index")
    rest = Labels(source.shape, source.without(dim))
    return replay(flow, node, rest, lambda ids: ids.unbind(dim))


def _select(node: fx.Node, remaining: Remaining) -> None:
    source, dim, number = node.args
    rank = source.meta["val"].dim()  # type: ignore[union-attr]
    mask = remaining.operand(source).get(int(dim) % rank)  # type: ignore[arg-type]
    if mask is not None:
        node.update_arg(2, int(mask[: int(number) % mask.numel()].sum()))  # type: ignore[arg-type]


def _index(node: fx.Node, remaining: Remaining) -> None:
    """A constant list of indices, already cut, is renumbered."""
    args: Any = node.args
    source = args[0]
    if "index_select" in str(node.target):
        dim, index = args[1] % source.meta["val"].dim(), args[2]
    else:
        dim, index = next((dim, item) for dim, item in enumerate(args[1]) if item is not None)
    mask = remaining.operand(source).get(dim)
    if mask is not None:
        old = remaining.program.tensor(str(index.target))
        number = (mask.cumsum(0) - 1).to(old.device, old.dtype)
        set_tensor(remaining.program, str(index.target), number[old.long() % mask.numel()])


RULES: dict[Any, OperatorRule] = {
    aten.index: OperatorRule(index, _index),
    aten.index_select: OperatorRule(index_select, _index),
    aten.select: OperatorRule(select, _select),
    aten.gather: OperatorRule(gather),
    aten.take_along_dim: OperatorRule(take_along),
    **dict.fromkeys((aten.bucketize, aten.isin), OperatorRule(bucketize)),
    aten.unbind: OperatorRule(unbind),
}
