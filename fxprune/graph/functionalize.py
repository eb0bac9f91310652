"""In-place writes into a part of a tensor become functions of the whole tensor.

    part = slice(x, 1, 0, 8); copy_(part, y)      ->      x_1 = slice_scatter(x, y, 1, 0, 8)

and whatever reads ``x`` afterwards reads ``x_1``. Parameters and buffers that the model writes are
its state: the graph computes on a copy, and its last calls store what they become.

    mul_(m, 0.9); add(x, m)    ->    old = clone(m); new = mul(old, 0.9); add(x, new); copy_(m, new)
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx

from fxprune.graph.program import Program

aten = torch.ops.aten

Order = dict[fx.Node, int]


def is_view(node: fx.Node) -> bool:
    """Whether a call's result may share memory with its first argument."""
    if node.target is operator.getitem:
        return True
    returns = node.target._schema.returns if isinstance(node.target, torch._ops.OpOverload) else ()
    return any(value.alias_info is not None for value in returns)


def written(node: fx.Node) -> list[fx.Node]:
    """Return the arguments that a call writes into."""
    if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable:
        return []
    schema = node.target._schema.arguments
    given: dict[str, Any] = dict(zip((one.name for one in schema), node.args, strict=False))
    given |= node.kwargs
    places = (given.get(one.name) for one in schema if one.alias_info and one.alias_info.is_write)
    return [place for place in places if isinstance(place, fx.Node)]


def aliases(node: fx.Node) -> set[fx.Node]:
    """Return the nodes that may share memory with a node, itself included."""
    seen, queue = {node}, [node]
    while queue:
        current = queue.pop()
        neighbours = [user for user in current.users if is_view(user) and user.args[0] is current]
        if is_view(current) and isinstance(current.args[0], fx.Node):
            neighbours.append(current.args[0])
        fresh = [other for other in neighbours if other not in seen]
        seen.update(fresh)
        queue.extend(fresh)
    return seen


def read_after(nodes: set[fx.Node], at: int, order: Order) -> bool:
    """Whether anything after position ``at`` reads one of the nodes that came before."""
    before = [node for node in nodes if order.get(node, -1) <= at]
    return any(order.get(user, -1) > at for node in before for user in node.users)


def write_through(node: fx.Node, target: Any, order: Order) -> bool:
    """Replace an in-place call on a part of a tensor by a function of the whole.

    Args:
        node: the in-place call; its first argument is sliced or selected from the whole.
        target: what computes the part's new value.
        order: positions of the nodes in the graph.

    Returns:
        Whether that was possible: no other name of the memory is read afterwards.

    """
    chain = _chain(node.args[0])
    if chain is None:
        return False
    whole, *parts = chain
    part = chain[-1]
    others = aliases(whole) - {*chain, node}
    if whole.op in ("placeholder", "get_attr") or read_after(
        (others | set(parts)) - {part}, order[node], order
    ):
        return False
    graph, at = node.graph, order[node]
    with graph.inserting_before(node):
        value = _call(graph, node, target, node.args, node.kwargs)
        first = value
        for taken in reversed(parts):
            value = _scattered(graph, taken, value)
    for old, new in ((part, first), (whole, value)):
        for user in [user for user in old.users if order.get(user, -1) > at]:
            user.replace_input_with(old, new)
    node.replace_all_uses_with(first)
    graph.erase_node(node)
    order[first] = order[value] = at
    return True


def _chain(part: Any) -> list[fx.Node] | None:
    """Return the whole, then the parts of parts that lead to ``part``."""
    chain = [part]
    while chain[0].target in (aten.slice.Tensor, aten.select.int):
        chain.insert(0, chain[0].args[0])
    return chain if len(chain) > 1 else None


def _scattered(graph: fx.Graph, part: fx.Node, value: fx.Node) -> fx.Node:
    """Write a part's value into what it was taken from."""
    args: Any = part.args
    source, dim, *bounds = args
    if part.target is aten.select.int:
        dim %= source.meta["val"].dim()
        index = bounds[0] if bounds[0] >= 0 else bounds[0] + source.meta["val"].shape[dim]
        value = _call(graph, part, aten.unsqueeze.default, (value, dim), {})
        bounds = [index, index + 1]
    whole = _call(graph, part, aten.slice_scatter.default, (source, value, dim, *bounds), {})
    whole.meta["val"] = source.meta["val"]  # a later write may be into this one
    return whole


def _call(graph: fx.Graph, like: fx.Node, target: Any, args: Any, kwargs: Any) -> fx.Node:
    node = graph.call_function(target, tuple(args), dict(kwargs))
    node.meta = {key: like.meta[key] for key in ("nn_module_stack", "stack_trace")
                 if key in like.meta}  # fmt: skip
    return node


def separate_state(program: Program) -> None:
    """Let a graph compute on copies of what it writes, and store the results at its end."""
    first: dict[int, fx.Node] = {}
    for node in list(program.tensor_nodes()):
        whole = first.setdefault(id(program.tensor(str(node.target))), node)
        if whole is not node:  # another name of the same tensor
            node.replace_all_uses_with(whole)
    output = program.graph.output_node()
    for node in first.values():
        if not any(node in map(base_of, written(call)) for call in program.graph.nodes):
            continue
        with program.graph.inserting_before(min(node.users)):
            held = program.graph.call_function(aten.clone.default, (node,))
        for user in [user for user in node.users if user is not held]:
            user.replace_input_with(node, held)
        held.meta["val"] = node.meta.get("val")
        with program.graph.inserting_before(output):
            value = program.graph.call_function(aten.detach.default, (held,))
            place = program.graph.call_function(aten.detach.default, (node,))
            program.graph.call_function(aten.copy_.default, (place, value))


def base_of(node: fx.Node) -> fx.Node:
    """Return what a view, or a view of a view, was taken from."""
    while is_view(node) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def state_of(program: Program) -> tuple[str, ...]:
    """Name the parameters and buffers that a program writes when it runs."""
    places = [base_of(node) for call in program.graph.nodes for node in written(call)]
    return tuple(dict.fromkeys(str(node.target) for node in places if node.op == "get_attr"))


@contextmanager
def state_kept(program: Program) -> Iterator[None]:
    """Put back, at the end, what the program has written into its parameters and buffers."""
    before = {name: program.tensor(name).detach().clone() for name in state_of(program)}
    try:
        yield
    finally:
        for name, value in before.items():
            program.tensor(name).detach().copy_(value)
