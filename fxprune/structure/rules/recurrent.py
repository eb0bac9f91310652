"""Recurrent layers and cells: hidden units with a row for every gate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxprune.graph.node_args import arguments
from fxprune.structure.flow import Flow, Rule
from fxprune.structure.labels import DimLabels, Labels
from fxprune.structure.reads import NotCovered, Read
from fxprune.structure.rules.record import OperatorRule

aten = torch.ops.aten


@dataclass(frozen=True)
class _Cell:
    """The identities of a cell's hidden units, and of what it gives on: projections, if any."""

    hidden: Tensor
    given: Tensor


def recurrent(gates: int) -> Rule:
    """Make the rule of a recurrent layer with that many gates per hidden unit."""

    def rule(flow: Flow, node: fx.Node) -> Any:
        given = arguments(node)
        parameters = [flow.labels(item) for item in given["params"]]
        directions = 2 if given["bidirectional"] else 1
        count = directions * given["num_layers"]
        per_cell = len(parameters) // count
        place = list(given).index("params")
        operand = flow.labels(given["data" if "data" in given else "input"])
        incoming = [(operand, len(operand.shape) - 1)]
        reads: list[Read] = []
        cells: list[_Cell] = []
        width = torch.empty(0, dtype=torch.int32)
        projects = per_cell > (4 if given["has_biases"] else 2)
        for first in range(0, len(parameters), per_cell):
            own = parameters[first : first + per_cell]
            reads += [Read((place, first), 1), Read((place, first + 1), 1)]
            reads += [Read((place, first + per_cell - 1), 1)] * projects
            cells.append(_cell(flow, node, own, gates, incoming, projects))
            if len(cells) % directions == 0:
                width = torch.cat([cell.given for cell in cells[-directions:]])
                incoming = [(_vector(width), 0)]
        flow.reads[node] = tuple(reads)
        for cell in cells[1:]:  # one state tensor holds the units of every cell
            flow.merge(node, cells[0].hidden, cell.hidden)
            flow.merge(node, cells[0].given, cell.given)
        states = given["hx"] if isinstance(given["hx"], (list, tuple)) else [given["hx"]]
        _states(flow, node, states, cells[0])
        return _outputs(node, (width, cells[0].given, cells[0].hidden))

    return rule


def _cell(
    flow: Flow, node: fx.Node, parameters: Sequence[Labels], gates: int,
    incoming: list[tuple[Labels, int]], projects: bool = False,
) -> _Cell:  # fmt: skip
    """Merge the gates' rows of a cell with its hidden units."""
    into, recur, *rest = parameters
    flow.align(node, [*incoming, (into, 1)], 0)
    given = _identities(recur, 1)
    hidden = given
    if projects:
        *rest, projection = rest
        hidden = _identities(projection, 1)
        flow.merge(node, given, _identities(projection, 0))
    for labels in (into, recur, *rest):
        rows = _identities(labels, 0).view(gates, -1)
        flow.merge(node, hidden.expand_as(rows), rows)
    return _Cell(hidden, given)


def _identities(labels: Labels, dim: int) -> Tensor:
    entry = next(labels.at(dim), None)
    if entry is None:
        raise NotCovered("its weights are computed, or it has a single hidden unit")
    return entry.ids


def _vector(ids: Tensor) -> Labels:
    return Labels((ids.numel(),), (DimLabels(0, ids),))


def _states(flow: Flow, node: fx.Node, states: Sequence[Any], cell: _Cell) -> None:
    """The first state is what cells give on, a second one their hidden units."""
    for state, ids in zip(states, (cell.given, cell.hidden), strict=False):
        labels = flow.labels(state)
        flow.align(node, [(labels, len(labels.shape) - 1), (_vector(ids), 0)], 0)


def _outputs(node: fx.Node, ids: Sequence[Tensor]) -> list[Labels]:
    return [
        Labels(tuple(value.shape), (DimLabels(value.dim() - 1, own),))
        for value, own in zip(node.meta["val"], ids, strict=False)
    ]


def recurrent_cell(gates: int) -> Rule:
    """Make the rule of a single step of a recurrent layer."""

    def rule(flow: Flow, node: fx.Node) -> Any:
        given = arguments(node)
        names = ("w_ih", "w_hh", "b_ih", "b_hh")
        parameters = [flow.labels(given[name]) for name in names if given[name] is not None]
        operand = flow.labels(given["input"])
        cell = _cell(flow, node, parameters, gates, [(operand, len(operand.shape) - 1)])
        matrices = [position for position, name in enumerate(given) if name in names[:2]]
        flow.reads[node] = tuple(Read((position,), 1) for position in matrices)
        states = given["hx"] if isinstance(given["hx"], (list, tuple)) else [given["hx"]]
        _states(flow, node, states, cell)
        if isinstance(node.meta["val"], Tensor):
            value = node.meta["val"]
            return Labels(tuple(value.shape), (DimLabels(value.dim() - 1, cell.hidden),))
        return _outputs(node, (cell.hidden, cell.hidden))

    return rule


RULES: dict[Any, OperatorRule] = {
    aten.lstm: OperatorRule(recurrent(4)),
    aten.gru: OperatorRule(recurrent(3)),
    **dict.fromkeys((aten.rnn_tanh, aten.rnn_relu), OperatorRule(recurrent(1))),
    aten.lstm_cell: OperatorRule(recurrent_cell(4)),
    aten.gru_cell: OperatorRule(recurrent_cell(3)),
    **dict.fromkeys((aten.rnn_tanh_cell, aten.rnn_relu_cell), OperatorRule(recurrent_cell(1))),
}
