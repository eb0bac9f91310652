"""Recurrent layers and cells: hidden units with a row for every gate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from fxprune.graph.node_args import arguments
from fxprune.structure.flow import Flow, Read, Rule
from fxprune.structure.labels import DimLabels, Labels
from fxprune.structure.rules.record import OperatorRule

aten = torch.ops.aten


def recurrent(gates: int) -> Rule:
    """Make the rule of a recurrent layer with that many gates per hidden unit."""

    def rule(flow: Flow, node: fx.Node) -> Any:
        given = arguments(node)
        parameters = [flow.labels(item) for item in given["params"]]
        directions = 2 if given["bidirectional"] else 1
        per_cell = 4 if given["has_biases"] else 2
        expected = per_cell * directions * given["num_layers"]
        states = given["hx"] if isinstance(given["hx"], (list, tuple)) else [given["hx"]]
        if len(parameters) != expected:
            flow.freeze_all(node, node.all_input_nodes, "projected recurrent cells have no rule")
            return _outputs(node, ())
        operand = flow.labels(given["input"])
        incoming = [(operand, len(operand.shape) - 1)]
        reads: list[Read] = []
        hidden: list[Tensor] = []
        width = torch.empty(0, dtype=torch.int32)
        for cell in range(0, expected, per_cell):
            own = _cell(flow, node, parameters[cell : cell + per_cell], gates, incoming)
            reads += [Read((2, cell), 1), Read((2, cell + 1), 1)]
            hidden.append(own)
            if len(hidden) % directions == 0:
                width = torch.cat(hidden[-directions:])
                incoming = [(Labels((width.numel(),), (DimLabels(0, width),)), 0)]
        flow.reads[node] = tuple(reads)
        for own in hidden[1:] if len(states) else []:
            flow.merge(node, hidden[0], own)  # one state tensor holds the units of every cell
        for state in states:
            labels = flow.labels(state)
            cell_state = Labels((hidden[0].numel(),), (DimLabels(0, hidden[0]),))
            flow.align(node, [(labels, len(labels.shape) - 1), (cell_state, 0)], 0)
        return _outputs(node, (width, hidden[0]))

    return rule


def _cell(
    flow: Flow, node: fx.Node, parameters: list[Labels], gates: int,
    incoming: list[tuple[Labels, int]],
) -> Tensor:  # fmt: skip
    """Merge the gates' rows of a cell; returns the identities of its hidden units."""
    into, recur, *biases = parameters
    flow.align(node, [*incoming, (into, 1)], 0)
    own = next(recur.at(1)).ids
    for labels in (into, recur, *biases):
        row = next(labels.at(0)).ids.view(gates, -1)
        flow.merge(node, own.expand_as(row), row)
    return own


def _outputs(node: fx.Node, ids: tuple[Tensor, ...]) -> list[Labels]:
    made = []
    for number, value in enumerate(node.meta["val"]):
        entries = (DimLabels(value.dim() - 1, ids[min(number, 1)]),) if ids else ()
        made.append(Labels(tuple(value.shape), entries))
    return made


RULES: dict[Any, OperatorRule] = {
    aten.lstm: OperatorRule(recurrent(4)),
    aten.gru: OperatorRule(recurrent(3)),
    aten.rnn_tanh: OperatorRule(recurrent(1)),
    aten.rnn_relu: OperatorRule(recurrent(1)),
}
