"""Gates: a factor on every unit, wherever it is read, one for each sample.

Removing a unit turns its gate from one to zero, exactly: whatever reads the unit reads zeros. So
derivatives in the gates are the derivatives of removal, for any architecture, and one backward pass
gives them for every unit and every sample of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from fxprune.graph.hooks import Call, run_with_hooks
from fxprune.graph.node_args import arguments
from fxprune.graph.program import Program, shape_of
from fxprune.structure.flow import Flow
from fxprune.structure.groups import Analysis, Group, analyse
from fxprune.structure.labels import Labels
from fxprune.structure.merging import Ints
from fxprune.structure.reads import Read


@dataclass(frozen=True)
class Gate:
    """A place where units are read: which gate applies to every index of a dimension.

    Attributes:
        argument: which argument of the node, as positions in its ``args``.
        dim: the dimension that holds the units.
        units: the unit of every index, or the number of units where there is none.

    """

    argument: tuple[Any, ...]
    dim: int
    units: Tensor


@dataclass(frozen=True, eq=False)
class GatedProgram:
    """A program whose units carry gates.

    Attributes:
        program: the program, unchanged.
        gates: by node, the gates on what it reads.
        units: how many units there are.

    """

    program: Program
    gates: Mapping[fx.Node, tuple[Gate, ...]]
    units: int

    @classmethod
    def of(cls, program: Program, groups: Sequence[Group]) -> GatedProgram:
        """Find where the units of the removable groups among these are read."""
        removable = [group for group in groups if group.frozen_because is None]
        preference = removable[0].preference if removable else "heads"
        analysis = analyse(program, preference)
        number = _numbers(analysis, removable)
        total = sum(len(group.units) for group in removable)
        gates = {
            node: found
            for node, reads in analysis.flow.reads.items()
            if (found := tuple(_gates(analysis.flow, node, reads, number, total)))
        }
        return cls(program, gates, total)

    def run(self, inputs: tuple[Any, ...], values: Tensor) -> Any:
        """Run the program with gates of these values.

        Args:
            inputs: the program's inputs, of ``n`` samples.
            values: (n, units), or (1, units) for gates that all samples share.

        """
        padded = torch.cat([values, values.new_ones(len(values), 1)], 1)

        def gated(call: Call) -> Any:
            args = call.args
            for gate in self.gates[call.node]:
                args = _apply(args, gate.argument, gate, padded)
            return call.value(*args)

        return run_with_hooks(self.program, inputs, dict.fromkeys(self.gates, gated))


def _numbers(analysis: Analysis, groups: Sequence[Group]) -> Ints:
    """Return the number of the unit of every identity; -1 where it belongs to none."""
    found = {group.name: group for group in analysis.groups}
    number = np.full(int(analysis.component.max(initial=0)) + 1, -1, dtype=np.int64)
    start = 0
    for group in groups:
        number[found[group.name].components] = np.arange(len(group.units)) + start
        start += len(group.units)
    by_identity: Ints = number[analysis.component]
    by_identity[0] = -1
    return by_identity


def _gates(
    flow: Flow, node: fx.Node, reads: Sequence[Read], number: Ints, total: int
) -> list[Gate]:
    carried = _carried(flow, node, number)
    gates = []
    for read in reads:
        source: Any = node.args
        for step in read.argument:
            source = source[step]
        labels = flow.labels(source)
        if not isinstance(source, fx.Node) or source.op == "get_attr" or not labels.shape:
            continue
        for layer in labels.at(read.dim):
            units = number[layer.ids.numpy()]
            if (units < 0).all() or (
                carried is not None and np.array_equal(units[units >= 0], carried)
            ):
                continue  # a depthwise convolution hands its channels on; they are read later
            gates.append(Gate(read.argument, layer.dim, torch.from_numpy(units % (total + 1))))
    return gates


def _carried(flow: Flow, node: fx.Node, number: Ints) -> Ints | None:
    """Return the units that a grouped convolution hands on, channel by channel."""
    given, labels = arguments(node), flow.labels(node)
    if given.get("groups", 1) == 1 or not isinstance(labels, Labels):
        return None
    channel = len(shape_of(node)) - len(shape_of(given["weight"])) + 1
    for layer in labels.at(channel):
        units: Ints = number[layer.ids.numpy()]
        return units[units >= 0]
    return None


def _apply(args: Any, path: tuple[Any, ...], gate: Gate, padded: Tensor) -> Any:
    if path:
        changed = list(args)
        changed[path[0]] = _apply(args[path[0]], path[1:], gate, padded)
        return tuple(changed) if isinstance(args, tuple) else changed
    factors = padded[:, gate.units.to(padded.device)].to(args.dtype)
    view = [1] * args.dim()
    view[gate.dim] = factors.shape[1]
    samples = len(padded)
    if samples > 1 and gate.dim and args.shape[0] % samples == 0:
        view[0] = args.shape[0]  # windows and tokens of a sample lie together
        factors = factors.repeat_interleave(args.shape[0] // samples, 0)
    else:  # samples cannot be told apart here: each takes an equal share
        factors = factors.mean(0)
    return args * factors.view(view)
