"""Scattering: values are written or added where numbers say; that dimension stays whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from fxprune.graph.node_args import arguments
from fxprune.structure.flow import Flow
from fxprune.structure.labels import DimLabels, Labels
from fxprune.structure.rules.record import OperatorRule

aten = torch.ops.aten
NUMBERED = "what is written along it is chosen by numbers"


def index_add(flow: Flow, node: fx.Node) -> Any:
    """Rows are added, copied or filled where the index says; the other dimensions must agree."""
    given = arguments(node)
    whole, source = flow.labels(given["self"]), flow.labels(given.get("source"))
    dim = given["dim"] % max(len(whole.shape), 1)
    flow.freeze(node, [*whole.at(dim), *source.at(dim)], NUMBERED)
    flow.freeze(node, flow.labels(given["index"]).entries, "it holds indices", silent=True)
    entries: tuple[DimLabels, ...] = ()
    for other in range(len(whole.shape)):
        if other != dim:
            met = [(whole, other), *([(source, other)] if source.shape else [])]
            entries += flow.align(node, met, other)
    return Labels(whole.shape, entries)


def scatter(flow: Flow, node: fx.Node) -> Any:
    """Elements go where an index of their own says; the other dimensions must agree."""
    given = arguments(node)
    whole, index = flow.labels(given["self"]), flow.labels(given["index"])
    source = flow.labels(given.get("src"))
    parts = [index, *([source] if source.shape else [])]
    dim = given["dim"] % max(len(whole.shape), 1)
    flow.freeze(node, [entry for part in (whole, *parts) for entry in part.at(dim)], NUMBERED)
    entries: tuple[DimLabels, ...] = ()
    for other in range(len(whole.shape)):
        if other == dim:
            continue
        if all(part.shape[other] == whole.shape[other] for part in parts):
            entries += flow.align(node, [(part, other) for part in (whole, *parts)], other)
        else:
            met = [entry for part in (whole, *parts) for entry in part.at(other)]
            flow.freeze(node, met, "only a part of it is written")
    return Labels(whole.shape, entries)


def index_put(flow: Flow, node: fx.Node) -> Any:
    """``x[indices] = values``: indexed dimensions stay, the others must agree with the values."""
    whole, values = flow.labels(node.args[0]), flow.labels(node.args[2])
    indices: list[Any] = list(node.args[1])  # type: ignore[arg-type]
    rank = len(whole.shape)
    used, taken = [], 0
    for item in indices:
        value = item.meta["val"] if item is not None else None
        span = value.dim() if isinstance(value, Tensor) and value.dtype == torch.bool else 1
        used += list(range(taken, taken + span)) if item is not None else []
        taken += span
    flow.freeze(node, [entry for dim in used for entry in whole.at(dim)], NUMBERED)
    for item in filter(None, indices):
        flow.freeze(node, flow.labels(item).entries, "it holds indices", silent=True)
    # Behind the last indexed dimension, and only there, places count from the end.
    entries: tuple[DimLabels, ...] = ()
    met = set()
    for dim in range(max(used, default=-1) + 1, rank):
        place = dim - rank + len(values.shape)
        met.add(place)
        entries += flow.align(node, [(whole, dim), *([(values, place)] if place >= 0 else [])], dim)
    left = [entry for entry in whole.entries if entry.dim < max(used, default=-1)]
    flow.freeze(node, left, NUMBERED)
    rest = [entry for entry in values.entries if entry.dim not in met]
    flow.freeze(node, rest, "it is written where numbers say")
    return Labels(whole.shape, entries)


def select_scatter(flow: Flow, node: fx.Node) -> Any:
    """One index is written over, and so stays; the other dimensions must agree."""
    given = arguments(node)
    whole, source = flow.labels(given["self"]), flow.labels(given["src"])
    dim = given["dim"] % len(whole.shape)
    flow.freeze(node, whole.at(dim), "one index of it is written over by its number")
    entries: tuple[DimLabels, ...] = ()
    for other in range(len(whole.shape)):
        if other != dim:
            met = [(whole, other), (source, other - (other > dim))]
            entries += flow.align(node, met, other)
    return Labels(whole.shape, entries)


RULES: dict[Any, OperatorRule] = {
    **dict.fromkeys(
        (aten.index_add, aten.index_copy, aten.index_fill, aten.index_reduce),
        OperatorRule(index_add),
    ),
    **dict.fromkeys((aten.scatter, aten.scatter_add, aten.scatter_reduce), OperatorRule(scatter)),
    aten.index_put: OperatorRule(index_put),
    aten.select_scatter: OperatorRule(select_scatter),
}
