"""The record of an operator: what it does to dimensions, and how removal repairs its call."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from fxprune.graph.program import Program
from fxprune.graph.surgery import insert_call
from fxprune.structure.flow import Rule


@dataclass(frozen=True)
class Remaining:
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

    def resized(self, node: fx.Node, size: Any, dim: int) -> Any:
        """Return the argument of a call that gives a dimension of its output the new size.

        Args:
            node: the call.
            size: the argument now: a number, or a node that computes one from other sizes.
            dim: the dimension of the only output.

        """
        if not isinstance(size, fx.Node):
            return self.size(dim)
        return scaled(self.program, node, size, self.size(dim), self.before[0][dim])


def scaled(program: Program, before: fx.Node, size: fx.Node, new: int, old: int) -> fx.Node:
    """Insert the calls that scale a computed size by ``new / old``, ahead of a node."""
    common = math.gcd(new, old)
    new, old = new // common, old // common
    if size.target is operator.floordiv and size.args[1] == new:
        inner = size.args[0]
        if isinstance(inner, fx.Node) and inner.target is operator.mul and inner.args[1] == old:
            return inner.args[0]  # type: ignore[return-value]  # it was scaled the other way
    if size.target is operator.mul and isinstance(size.args[1], int) and size.args[1] % old == 0:
        return insert_call(program, before, operator.mul, (size.args[0], size.args[1] // old * new))
    product = insert_call(program, before, operator.mul, (size, new))
    return insert_call(program, before, operator.floordiv, (product, old))


Repair = Callable[[fx.Node, Remaining], None]


@dataclass(frozen=True)
class OperatorRule:
    """What is known of an operator's dimensions.

    Attributes:
        rule: called as ``rule(flow, node)``, labels the outputs.
        repair: called as ``repair(node, remaining)`` after a removal, brings in line what the
            call takes as plain numbers; None where it takes no such number.

    """

    rule: Rule
    repair: Repair | None = None
