"""Pooling, interpolation, sampling, embedding and recurrent cells."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from fxprune.graph.node_args import arguments
from fxprune.structure.flow import Flow, Read, Rule
from fxprune.structure.labels import Labels, Layer

aten = torch.ops.aten


def spatial(extent: int) -> Rule:
    """Make the rule of an operator that works on the last ``extent`` dimensions."""

    def rule(flow: Flow, node: fx.Node) -> Any:
        operand = flow.labels(node.args[0])
        dims = range(len(operand.shape) - extent, len(operand.shape))
        inside = [layer for layer in operand.layers if layer.dim in dims]
        flow.freeze(node, inside, "it is pooled or resampled as space")
        layers = operand.without(*dims)
        value = node.meta["val"]
        if isinstance(value, Tensor):
            return Labels(tuple(value.shape), layers)
        return [Labels(tuple(item.shape), layers) for item in value]

    return rule


def grid_sample(flow: Flow, node: fx.Node) -> Any:
    """Channels pass; positions come from the grid."""
    flow.freeze_all(node, [node.args[1]], "it says where to sample")  # type: ignore[list-item]
    operand = flow.labels(node.args[0])
    layers = tuple(layer for layer in operand.layers if layer.dim < 2)
    return Labels(tuple(node.meta["val"].shape), layers)


def embedding(flow: Flow, node: fx.Node) -> Any:
    """Rows are looked up by number and stay; the width is removable."""
    table = flow.labels(node.args[0])
    flow.freeze(node, table.at(0), "rows of an embedding are looked up by number", silent=True)
    flow.freeze(node, flow.labels(node.args[1]).layers, "it says what to look up", silent=True)
    shape = tuple(node.meta["val"].shape)
    return Labels(shape, tuple(Layer(len(shape) - 1, layer.ids) for layer in table.at(1)))


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
                incoming = [(Labels((width.numel(),), (Layer(0, width),)), 0)]
        flow.reads[node] = tuple(reads)
        for own in hidden[1:] if len(states) else []:
            flow.merge(node, hidden[0], own)  # one state tensor holds the units of every cell
        for state in states:
            labels = flow.labels(state)
            cell_state = Labels((hidden[0].numel(),), (Layer(0, hidden[0]),))
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
        layers = (Layer(value.dim() - 1, ids[min(number, 1)]),) if ids else ()
        made.append(Labels(tuple(value.shape), layers))
    return made


def _pools() -> dict[Any, Rule]:
    rules: dict[Any, Rule] = {}
    names = ("avg_pool{}d", "max_pool{}d", "adaptive_avg_pool{}d", "adaptive_max_pool{}d",
             "max_pool{}d_with_indices", "lp_pool{}d", "fractional_max_pool{}d",
             "_adaptive_avg_pool{}d")  # fmt: skip
    for extent in (1, 2, 3):
        found = [name.format(extent) for name in names]
        rules |= {getattr(aten, name): spatial(extent) for name in found if hasattr(aten, name)}
    shapes = (("upsample_nearest{}d", (1, 2, 3)), ("_upsample_nearest_exact{}d", (1, 2, 3)),
              ("upsample_bilinear{}d", (2,)), ("_upsample_bilinear{}d_aa", (2,)),
              ("upsample_bicubic{}d", (2,)), ("_upsample_bicubic{}d_aa", (2,)),
              ("upsample_linear{}d", (1,)), ("upsample_trilinear{}d", (3,)))  # fmt: skip
    for pattern, extents in shapes:
        for extent in extents:
            rules[getattr(aten, pattern.format(extent))] = spatial(extent)
    return rules


RULES: dict[Any, Rule] = {
    **_pools(),
    aten.grid_sampler: grid_sample,
    aten.grid_sampler_2d: grid_sample,
    aten.embedding: embedding,
    aten.lstm: recurrent(4),
    aten.gru: recurrent(3),
    aten.rnn_tanh: recurrent(1),
    aten.rnn_relu: recurrent(1),
}
