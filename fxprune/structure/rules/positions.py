"""What a removal leaves, and the repair of the indices and bounds that calls carry."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxprune.graph.program import Program
from fxprune.graph.surgery import set_tensor

aten = torch.ops.aten


@dataclass(frozen=True)
class Remains:
    """What removal leaves of a node's values.

    Attributes:
        before: for each output of the node, its shape in the dense program.
        kept: for each output, by dimension, a bool mask over indices; absent where all stay.
        operand: the same mapping for a given argument node.
        program: whose tensors are cut already, as far as the graph has been walked.

    """

    before: Sequence[tuple[int, ...]]
    kept: Sequence[dict[int, Tensor]]
    operand: Callable[[Any], dict[int, Tensor]]
    program: Program

    def size(self, dim: int, output: int = 0) -> int:
        """The new size of an output's dimension."""
        if dim in self.kept[output]:
            return int(self.kept[output][dim].sum())
        return self.before[output][dim]


Repair = Callable[[fx.Node, Remains], None]


def _slice(node: fx.Node, remains: Remains) -> None:
    rank = len(remains.before[0])
    dim = int(node.args[1] if len(node.args) > 1 else 0) % rank  # type: ignore[arg-type]
    mask = remains.operand(node.args[0]).get(dim)
    if mask is not None:
        _shift_bounds(node, mask, (2, 3))


def _shift_bounds(node: fx.Node, mask: Tensor, positions: tuple[int, int]) -> None:
    """Count bounds anew; those of a strided slice lie in the first block and past the end."""
    length, stride = mask.numel(), positions[1] + 1
    if len(node.args) > stride and node.args[stride] != 1:
        return
    for position in positions:
        bound = node.args[position] if len(node.args) > position else None
        if isinstance(bound, int) and -length <= bound < length:
            node.update_arg(position, int(mask[: bound % length].sum()))


def _slice_scatter(node: fx.Node, remains: Remains) -> None:
    dim = int(node.args[2] if len(node.args) > 2 else 0) % len(remains.before[0])  # type: ignore[arg-type]
    mask = remains.kept[0].get(dim)
    if mask is not None:
        _shift_bounds(node, mask, (3, 4))


def _select(node: fx.Node, remains: Remains) -> None:
    source, dim, number = node.args
    rank = source.meta["val"].dim()  # type: ignore[union-attr]
    mask = remains.operand(source).get(int(dim) % rank)  # type: ignore[arg-type]
    if mask is not None:
        node.update_arg(2, int(mask[: int(number) % mask.numel()].sum()))  # type: ignore[arg-type]


def _roll(node: fx.Node, remains: Remains) -> None:
    """What wraps around is counted anew."""
    shifts, rank = list(node.args[1]), len(remains.before[0])  # type: ignore[arg-type]
    for number, dim in enumerate(node.args[2] if len(node.args) > 2 else ()):  # type: ignore[arg-type]
        mask = remains.operand(node.args[0]).get(dim % rank)
        if mask is not None:
            wrapped = shifts[number] % mask.numel()
            shifts[number] = int(mask[mask.numel() - wrapped :].sum())
    node.update_arg(1, shifts)


def _index(node: fx.Node, remains: Remains) -> None:
    """A constant list of indices, already cut, is renumbered."""
    args: Any = node.args
    source = args[0]
    if "index_select" in str(node.target):
        dim, index = args[1] % source.meta["val"].dim(), args[2]
    else:
        dim, index = next((dim, item) for dim, item in enumerate(args[1]) if item is not None)
    mask = remains.operand(source).get(dim)
    if mask is not None:
        old = remains.program.tensor(str(index.target))
        number = (mask.cumsum(0) - 1).to(old.device, old.dtype)
        set_tensor(remains.program, str(index.target), number[old.long() % mask.numel()])


def _narrow(node: fx.Node, remains: Remains) -> None:
    rank = len(remains.before[0])
    dim = int(node.args[1]) % rank  # type: ignore[arg-type]
    mask = remains.operand(node.args[0]).get(dim)
    if mask is not None:
        node.update_arg(2, int(mask[: int(node.args[2])].sum()))  # type: ignore[arg-type]
        node.update_arg(3, remains.size(dim))


POSITIONS: Mapping[Any, Repair] = {
    aten.slice: _slice,
    aten.slice_scatter: _slice_scatter,
    aten.narrow: _narrow,
    aten.select: _select,
    aten.roll: _roll,
    aten.index: _index,
    aten.index_select: _index,
}
