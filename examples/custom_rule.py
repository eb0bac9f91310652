"""Register your own operators, so that the dimensions that they meet can shrink.

Run ``python -m examples.custom_rule`` in the checkout; it takes a few seconds.

An operator without a rule freezes every dimension that it meets, and the report names it. This
example registers two operators, with everything that fxprune can know of them:

- ``soft_clip`` is pointwise, and needs nothing else;
- ``mix`` sums over channels: its rule states which dimensions keep their indices and which one it
  sums over; its repair adjusts the width, which is a plain number among its arguments; and its cost
  is that of a matrix product.

A package registers operators for every run of fxprune with an entry point in its
``pyproject.toml``, which names a module with calls like those in ``register`` below:

    [project.entry-points."fxprune.operators"]
    mixing = "my_package.pruning"
"""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

import fxprune
from fxprune.graph.macs import Place, every_dimension
from fxprune.structure.flow import Flow
from fxprune.structure.labels import Labels
from fxprune.structure.reads import NotCovered
from fxprune.structure.rules.products import contract
from fxprune.structure.rules.record import Remaining


@torch.library.custom_op("examples::soft_clip", mutates_args=())
def soft_clip(x: Tensor) -> Tensor:
    """Squeeze every element into the range from -1 to 1."""
    return x / (1 + x.abs())


@soft_clip.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("examples::mix", mutates_args=())
def mix(x: Tensor, weight: Tensor, width: int) -> Tensor:
    """Let every output channel be a weighted sum of ``width`` input channels.

    ``x`` is (batch, inputs, height, width), ``weight`` is (outputs, inputs).
    """
    if x.shape[1] != width:
        raise ValueError(f"there are {x.shape[1]} channels, not {width}")
    return torch.einsum("bihw,oi->bohw", x, weight)


@mix.register_fake
def _(x: Tensor, weight: Tensor, width: int) -> Tensor:
    if x.shape[1] != width:
        raise ValueError(f"there are {x.shape[1]} channels, not {width}")
    return x.new_empty(x.shape[0], weight.shape[0], *x.shape[2:])


def mix_rule(flow: Flow, node: fx.Node) -> Labels:
    """The input's channels meet the weight's and are summed; all else passes."""
    operand, weight = flow.labels(node.args[0]), flow.labels(node.args[1])
    if len(operand.shape) != 4:
        raise NotCovered("images have four dimensions")
    return contract(flow, node, [((0,), operand, "bihw"), ((1,), weight, "oi")], "bohw")


def mix_repair(node: fx.Node, remaining: Remaining) -> None:
    """The width is the number of input channels that are left."""
    mask = remaining.operand(node.args[0]).get(1)
    if mask is not None:
        node.update_arg(2, int(mask.sum()))


def mix_macs(node: fx.Node) -> list[tuple[Place, ...]]:
    """Every output element reads all input channels."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return [(*every_dimension(node), (source, 1))]


def register() -> None:
    """Say what fxprune should know of the two operators."""
    fxprune.operator_rule(torch.ops.examples.soft_clip, pointwise=True)
    # Usually a decorator above the rule; here it comes late, to show the difference.
    teach = fxprune.operator_rule(
        torch.ops.examples.mix, repair=mix_repair, macs=mix_macs, piecewise_linear=True
    )
    teach(mix_rule)


class Mixed(nn.Module):
    """Two convolutions around the operators."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 8, 3)
        self.weight, self.head = nn.Parameter(torch.randn(16, 16)), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = mix(soft_clip(self.first(x)), self.weight, 16)
        return self.head.forward(self.second(hidden).relu().mean((2, 3)))


def show(program: fxprune.Program) -> None:
    print(f"{fxprune.cost(program).macs:,} multiply-accumulates")
    for group in fxprune.find_groups(program):
        state = group.frozen_because or "removable"
        print(f"{len(group.units):4d} units, {state}: {group.name}")


def main() -> None:
    torch.manual_seed(0)
    program = fxprune.trace(Mixed().eval(), (torch.randn(2, 3, 12, 12),))
    print("without a rule:")
    show(program)

    register()
    print("with a rule:")
    show(program)

    free = [group for group in fxprune.find_groups(program) if group.frozen_because is None]
    wide = {group: range(0, 16, 2) for group in free if len(group.units) == 16}
    check = fxprune.verify_removal(program, wide)
    fxprune.remove_units(program, wide)
    print(f"8 of 16 channels removed, before and after the mix, exact to {check.error:.0e}")
    print(f"its weight is now {tuple(program.tensor('weight').shape)}")


if __name__ == "__main__":
    main()
