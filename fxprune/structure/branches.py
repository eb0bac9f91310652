"""Residual branches: what lies between a value and the addition that it skips to.

In ``add = x + branch(x)`` the branch can go as a whole, and the addition with it: what read the sum
reads ``x``. Widths cannot do that, since something of every group has to stay.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxprune.graph.comparison import worst_error
from fxprune.graph.draws import FixedDraws
from fxprune.graph.facts import MASKS, Masks
from fxprune.graph.functionalize import state_kept
from fxprune.graph.hooks import Call, run_with_hooks
from fxprune.graph.node_args import argument, packet_of
from fxprune.graph.operators import operator_of
from fxprune.graph.program import Program
from fxprune.graph.surgery import drop_unused, replace_node

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Branch:
    """A residual branch.

    Attributes:
        module: the name of the innermost module that holds all its weights; may be empty.
        add: the addition that ends it.
        skip: the value that goes on without it.
        end: the branch's own value, which is added.
        weights: the names of the weights inside.

    """

    module: str
    add: fx.Node
    skip: fx.Node
    end: fx.Node
    weights: tuple[str, ...]

    @property
    def title(self) -> str:
        """The module and what of it the branch has, or else the addition."""
        if not self.module:
            return self.add.name
        inner = (name.removeprefix(f"{self.module}.").split(".")[0] for name in self.weights)
        return f"{self.module} ({', '.join(dict.fromkeys(inner))})"


def find_branches(program: Program) -> tuple[Branch, ...]:
    """Return the residual branches that hold layers and feed nothing but their sums, in order."""
    nodes = list(program.graph.nodes)
    order = {node: number for number, node in enumerate(nodes)}
    found = []
    for add in nodes:
        ends = _ends(add)
        for skip, end in (ends, ends[::-1]) if ends else ():
            inside = _between(nodes[order[skip] + 1 : order[end] + 1], skip, end)
            weights = tuple(_weights(nodes, inside)) if _is_closed(inside, add) else ()
            if any(program.tensor(name).dim() > 1 for name in weights):
                found.append(Branch(_module(weights), add, skip, end, weights))
    return tuple(found)


def _ends(add: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two values of a plain sum that are of one shape."""
    if packet_of(add) is not aten.add or len(add.args) != 2:
        return None
    shapes = [getattr(getattr(item, "meta", {}).get("val"), "shape", None) for item in add.args]
    if argument(add, "alpha") not in (None, 1) or shapes[0] is None or shapes[0] != shapes[1]:
        return None
    left, right = add.args
    return (left, right) if left is not right else None  # type: ignore[return-value]


def _between(nodes: Sequence[fx.Node], skip: fx.Node, end: fx.Node) -> frozenset[fx.Node]:
    """The nodes on ways from one value to another; sizes do not lead on."""
    reached = {skip}
    for node in nodes:
        if _holds_tensors(node) and not reached.isdisjoint(node.all_input_nodes):
            reached.add(node)
    needed = {end} & reached
    for node in reversed(nodes):
        if node in needed:
            needed.update(reached.intersection(node.all_input_nodes))
    return frozenset(needed - {skip})


def _is_closed(inside: frozenset[fx.Node], add: fx.Node) -> bool:
    return all(user is add or user in inside for node in inside for user in node.users)


def _holds_tensors(node: fx.Node) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(node.meta.get("val")))


def _weights(nodes: Sequence[fx.Node], inside: frozenset[fx.Node]) -> Iterator[str]:
    for node in nodes:
        if node.op == "get_attr" and not inside.isdisjoint(node.users):
            yield str(node.target)


def _module(weights: Sequence[str]) -> str:
    parts = [name.split(".")[:-1] for name in weights]
    alike = itertools.takewhile(lambda names: len(set(names)) == 1, zip(*parts, strict=False))
    return ".".join(names[0] for names in alike)


def remove_branch(program: Program, branch: Branch) -> None:
    """Let what reads a branch's sum read the value that was skipped to it, in place.

    A clamp of what is clamped already goes too. Tensors that nothing reads any more are dropped.
    """
    readers = list(branch.add.users)
    replace_node(program, branch.add, branch.skip)
    for reader in readers:
        if _repeats(reader, branch.skip):
            replace_node(program, reader, branch.skip)
    drop_unused(program)
    _drop_masks(program)
    program.refresh()


def _repeats(reader: fx.Node, value: fx.Node) -> bool:
    if not operator_of(reader).clamps:
        return False
    limits = [(node.target, node.args[1:], node.kwargs) for node in (reader, value)]
    return limits[0] == limits[1]


def _drop_masks(program: Program) -> None:
    masks = program.facts.get(MASKS.name)
    if masks is not None:
        left = set(program.graph_module.state_dict())
        keep = {name: mask for name, mask in masks.keep.items() if name in left}
        program.put(MASKS, Masks(keep, masks.pattern))


def silence_error(program: Program, branches: Sequence[Branch], smaller: Program) -> float:
    """Compare a program without branches with the program that has them, silenced.

    Args:
        program: it has the branches; their ends are multiplied by zero where they are added.
        branches: of that program.
        smaller: what removal made of it.

    Returns:
        The largest difference between the outputs on the example inputs, relative to the largest
        output.

    """
    ends = {branch.add: branch.add.args.index(branch.end) for branch in branches}
    inputs = program.example_inputs

    def silence(call: Call) -> Any:
        place = ends[call.node]
        return call.value(*(x * 0 if number == place else x for number, x in enumerate(call.args)))

    with torch.no_grad(), FixedDraws(normal=0.5):
        with state_kept(program):
            expected = run_with_hooks(program, inputs, dict.fromkeys(ends, silence))
        with state_kept(smaller):
            found = smaller(*inputs)
    return worst_error(expected, found)
