"""Teach the compiler an operator of your own, so that what it touches may shrink.

Run ``python -m examples.custom_rule`` in the checkout; it takes a few seconds.

Without a rule an operator freezes all it meets, and the report names it. A rule says which
dimensions keep the same indices. A package offers its rules to every fxprune run by an entry
point, a mapping from operators to rules, in its ``pyproject.toml``:

    [project.entry-points."fxprune.structure.rules.registry"]
    gates = "my_package.pruning:RULES"

    [project.entry-points."fxprune.repairs"]
    gates = "my_package.pruning:REPAIRS"

An operator that takes a size as a plain number needs a repair too, which brings the number in
line after a removal: here the width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

import fxprune
from fxprune.structure.flow import Flow
from fxprune.structure.labels import Labels
from fxprune.structure.rules.repair import Remains


@torch.library.custom_op("examples::leaky_gate", mutates_args=())
def leaky_gate(x: Tensor, slope: Tensor, width: int) -> Tensor:
    """Gate every channel by a sigmoid with its own slope; ``width`` is the number of channels."""
    if x.shape[1] != width:
        raise ValueError(f"there are {x.shape[1]} channels, not {width}")
    return x * torch.sigmoid(x * slope[:, None, None])


@leaky_gate.register_fake
def _(x: Tensor, slope: Tensor, width: int) -> Tensor:
    if x.shape[1] != width:
        raise ValueError(f"there are {x.shape[1]} channels, not {width}")
    return torch.empty_like(x)


def gate_rule(flow: Flow, node: fx.Node) -> Labels:
    """The slope's only dimension is the operand's channels; all else passes."""
    operand, slope = flow.labels(node.args[0]), flow.labels(node.args[1])
    channels = flow.align(node, [(operand, 1), (slope, 0)], 1)
    return Labels(operand.shape, operand.without(1) + channels)


def gate_repair(node: fx.Node, remains: Remains) -> None:
    """The width follows the channels that are left."""
    node.update_arg(2, remains.size(1))


RULES: dict[Any, Any] = {torch.ops.examples.leaky_gate: gate_rule}
REPAIRS: dict[Any, Any] = {torch.ops.examples.leaky_gate: gate_repair}


class Gated(nn.Module):
    """Two convolutions around the operator."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 8, 3)
        self.slope, self.head = nn.Parameter(torch.randn(16)), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = leaky_gate(self.first(x), self.slope, 16)
        return self.head.forward(self.second(hidden).relu().mean((2, 3)))


def show(program: fxprune.Program) -> None:
    for group in fxprune.find_groups(program):
        state = group.frozen_because or "removable"
        print(f"{len(group.units):4d} units, {state}: {group.name}")


def main() -> None:
    torch.manual_seed(0)
    program = fxprune.trace(Gated().eval(), (torch.randn(2, 3, 12, 12),))
    print("without a rule:")
    show(program)

    # Usually a decorator above the rule; here it comes late, to show the difference.
    fxprune.operator_rule(torch.ops.examples.leaky_gate, repair=gate_repair)(gate_rule)
    print("with a rule:")
    show(program)

    group = next(g for g in fxprune.find_groups(program) if g.frozen_because is None)
    check = fxprune.verify_removal(program, {group: range(0, 16, 2)})
    fxprune.remove_units(program, {group: range(0, 16, 2)})
    print(f"8 of 16 channels removed, exact to {check.error:.0e}")
    print(f"slope is now {tuple(program.tensor('slope').shape)}")


if __name__ == "__main__":
    main()
