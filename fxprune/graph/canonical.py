"""One spelling for each thing a captured graph can say in several ways."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fxprune.graph.computed_weights import bake_computed_weights, settle_rewritten_weights
from fxprune.graph.functionalize import (
    aliases,
    base_of,
    read_after,
    separate_state,
    write_through,
    written,
)
from fxprune.graph.node_args import argument
from fxprune.graph.parametrisation import fold_parametrisations
from fxprune.graph.program import Program
from fxprune.graph.regions import inline_regions
from fxprune.graph.surgery import insert_call, replace_node

aten = torch.ops.aten


def canonicalise(program: Program) -> None:
    """Drop guards and assertions, make in-place calls functional, spell splits by their sizes.

    Parametrised weights become plain ones of the same name, as do weights that forward computes by
    mixing the elements of parameters. What the model writes is stored by the graph's last calls.

    Leaves an in-place call where a view of its operand is read later, since the two would part.
    """
    inline_regions(program)
    _drop_checks(program.graph)
    separate_state(program)
    _make_functional(program.graph)
    _spell_plainly(program)
    fold_parametrisations(program)
    settle_rewritten_weights(program)
    bake_computed_weights(program)
    program.refresh()
    _spell_copies(program)
    _drop_empty_parts(program)
    _spell_splits_by_sizes(program.graph)


def _drop_checks(graph: fx.Graph) -> None:
    for node in reversed(graph.nodes):
        name = str(node.target)
        is_guard = node.op == "call_module" and name == "_guards_fn"
        is_check = name.startswith(("aten._assert", "aten.sym_constrain")) or name in (
            "aten._assert_scalar.default",
        )
        if (is_guard or is_check) and not node.users:
            graph.erase_node(node)
    graph.eliminate_dead_code()


def functional_form(target: Any) -> Callable[..., Any] | None:
    """Return the operator that computes what an in-place operator leaves behind, if there is one.

    >>> functional_form(torch.ops.aten.relu_.default)
    <OpOverload(op='aten.relu', overload='default')>
    """
    name, overload = getattr(target, "_opname", ""), getattr(target, "_overloadname", "")
    if not name.endswith("_") or name.endswith("__") or target.namespace != "aten":
        return None
    packet = getattr(aten, name[:-1], None)
    if packet is None or overload not in packet.overloads():
        return None
    found: Callable[..., Any] = getattr(packet, overload)
    return found


def _make_functional(graph: fx.Graph) -> None:
    order = {node: number for number, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        target = functional_form(node.target)
        if target is None or not isinstance(node.args[0], fx.Node):
            continue
        if base_of(node.args[0]).op == "get_attr":  # what stores state
            continue
        operand = node.args[0]
        others = aliases(operand) - {operand, node}
        if read_after(others, order[node], order):
            write_through(node, target, order)
            continue
        node.target = target
        for user in [user for user in operand.users if order.get(user, -1) > order[node]]:
            user.replace_input_with(operand, node)


def _spell_plainly(program: Program) -> None:
    """Constants are read as they are, and a channel shuffle is the views that it is made of."""
    for node in list(program.graph.nodes):
        source = node.args[0] if node.args else None
        if (
            node.target in COPIES
            and isinstance(source, fx.Node)
            and source.op == "get_attr"
            and not any(written(user) for user in node.users)
        ):
            node.replace_all_uses_with(source)
            program.graph.erase_node(node)
        if node.target is aten.channel_shuffle.default:
            _spell_shuffle(program, node)


def _spell_shuffle(program: Program, node: fx.Node) -> None:
    operand, groups = node.args
    assert isinstance(operand, fx.Node)
    assert isinstance(groups, int)
    channels = operand.meta["val"].shape[1]
    split = insert_call(
        program, node, aten.unflatten.int, (operand, 1, [groups, channels // groups])
    )
    turned = insert_call(program, node, aten.transpose.int, (split, 1, 2))
    replace_node(program, node, insert_call(program, node, aten.flatten.using_ints, (turned, 1, 2)))


COPIES = (aten.lift_fresh_copy.default, aten.detach_.default, aten.detach.default)


def _drop_empty_parts(program: Program) -> None:
    """What has no elements adds nothing to a concatenation, such as prefix tokens of no number."""
    for node in list(program.graph.nodes):
        if node.target is not aten.cat.default:
            continue
        parts = [part for part in node.args[0] if part.meta["val"].numel()]
        if len(parts) == 1 and parts[0].meta["val"].dtype == node.meta["val"].dtype:
            replace_node(program, node, parts[0])
        elif parts:
            node.update_arg(0, parts)
    program.graph.eliminate_dead_code()


def _spell_copies(program: Program) -> None:
    """What is copied over a whole value stands for it: ``aten.copy`` has no derivative."""
    for node in list(program.graph.nodes):
        if node.target is not aten.copy.default:
            continue
        target, value = node.args[:2]
        made, given = node.meta["val"], value.meta["val"]
        if given.shape != made.shape:
            rows = insert_call(program, node, aten.sym_size.int, (target, 0))
            sizes = [rows, *made.shape[1:]]
            value = insert_call(program, node, aten.expand.default, (value, sizes))
        if given.dtype != made.dtype:
            value = insert_call(program, node, aten.to.dtype, (value, made.dtype))
        replace_node(program, node, value)


def _spell_splits_by_sizes(graph: fx.Graph) -> None:
    """``chunk`` and ``split`` by one size become ``split_with_sizes``, which names every size.

    Splits of an activation along its first dimension stay: that may be the batch.
    """
    splits = (aten.chunk.default, aten.split.Tensor, aten.tensor_split.sections)
    activations: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or activations.intersection(node.all_input_nodes):
            activations.add(node)
        if node.target not in splits:
            continue
        operand = node.args[0]
        dim = argument(node, "dim") % operand.meta["val"].dim()
        if dim == 0 and operand in activations:
            continue
        node.target = aten.split_with_sizes.default
        node.args = (operand, [piece.shape[dim] for piece in node.meta["val"]], dim)
        node.kwargs = {}
