"""Regions that ``torch.export`` captures as operators on graphs of their own become plain calls.

``no_grad`` and ``enable_grad``: the calls inside, detached where gradients were off. ``autocast``:
the calls inside, with the casts that it makes, if any, written out. ``torch.cond``: both branches
and a choice between their results.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.utils import _pytree as pytree

from fxprune.graph.program import Program
from fxprune.graph.surgery import insert_call

aten = torch.ops.aten
ORDER = torch.ops.higher_order
Casting = frozenset[str]  # the kinds of devices for which autocast is on


def inline_regions(program: Program) -> int:
    """Replace every region by plain calls, nested ones too, in place; returns how many."""
    casting: dict[fx.Node, Casting] = {}
    count = 0
    while (node := _first_region(program)) is not None:
        _INLINE[node.target](program, node, casting)
        program.graph.erase_node(node)
        count += 1
    if count:
        _write_casts(program, casting)
        program.graph.eliminate_dead_code()
        program.graph_module.delete_all_unused_submodules()
    return count


def _first_region(program: Program) -> fx.Node | None:
    found = (node for node in program.graph.nodes if node.target in _INLINE)
    return next((node for node in found if node.target is not ORDER.cond or _chooses(node)), None)


def _chooses(node: fx.Node) -> bool:
    """Whether a tensor decides between branches, rather than a size."""
    decision = node.args[0]
    return isinstance(decision, fx.Node) and isinstance(decision.meta.get("val"), Tensor)


def _inline_gradients(program: Program, node: fx.Node, casting: dict[fx.Node, Casting]) -> None:
    enabled, body, *operands = node.args
    made = _copied(program, node, body, operands, casting, casting.get(node, frozenset()))
    if not enabled:
        made = [_detached(program, node, value) for value in made]
    _replace(node, made)


def _inline_autocast(program: Program, node: fx.Node, casting: dict[fx.Node, Casting]) -> None:
    device, _, enabled, _, body, *operands = node.args
    here = _inside(casting.get(node, frozenset()), device, None, enabled)
    _replace(node, _copied(program, node, body, operands, casting, here))


def _inside(around: Casting, device: Any, dtype: Any, enabled: Any) -> Casting:
    """The devices for which autocast is on, inside a region that switches it for one of them."""
    return around | {str(device)} if enabled else around - {str(device)}


def _inline_choice(program: Program, node: fx.Node, casting: dict[fx.Node, Casting]) -> None:
    decision, *branches, operands = node.args
    around = casting.get(node, frozenset())
    yes, no = (
        _copied(program, node, body, operands, casting, around)  # type: ignore[arg-type]
        for body in branches
    )
    made = [
        insert_call(program, node, aten.where.self, (decision, left, right))
        for left, right in zip(yes, no, strict=True)
    ]
    _replace(node, made)


_INLINE: Mapping[Any, Any] = {
    ORDER.wrap_with_set_grad_enabled: _inline_gradients,
    ORDER.wrap_with_autocast: _inline_autocast,
    ORDER.cond: _inline_choice,
}


def _copied(
    program: Program, region: fx.Node, body: Any, operands: Sequence[Any],
    casting: dict[fx.Node, Casting], here: Casting,
) -> list[Any]:  # fmt: skip
    """Copy a region's calls ahead of it; returns what its outputs are now."""
    inner = program.graph_module.get_submodule(str(body.target))
    assert isinstance(inner, fx.GraphModule)
    values: dict[fx.Node, Any] = {}
    given, around = iter(operands), [here]
    for node in inner.graph.nodes:
        if node.op == "placeholder":
            values[node] = next(given)
            continue
        if node.target is _enter_autocast:
            around.append(_inside(around[-1], *node.args[:3]))
            continue
        if node.target is _exit_autocast:
            around.pop()
            continue
        if node.op == "output":
            outputs = fx.map_arg(node.args[0], values.__getitem__)
            return list(outputs) if isinstance(outputs, (list, tuple)) else [outputs]
        with program.graph.inserting_before(region):
            copied = program.graph.node_copy(node, values.__getitem__)
        if node.op == "get_attr":
            copied.target = f"{body.target}.{node.target}"
        values[node], casting[copied] = copied, around[-1]
    raise AssertionError("a graph without an output")


def _detached(program: Program, before: fx.Node, value: Any) -> Any:
    if not isinstance(value, fx.Node) or not isinstance(value.meta.get("val"), Tensor):
        return value
    made = insert_call(program, before, aten.detach.default, (value,))
    made.meta["val"] = value.meta["val"]
    return made


def _replace(node: fx.Node, made: Sequence[Any]) -> None:
    """Let what reads an output of a region read what it is now."""
    if isinstance(node.meta.get("val"), Tensor):  # it has a single output, not a tuple of them
        node.replace_all_uses_with(made[0])
    for user in list(node.users):
        assert user.target is operator.getitem
        value = made[int(user.args[1])]  # type: ignore[arg-type]
        user.replace_all_uses_with(value)
        user.graph.erase_node(user)


def _write_casts(program: Program, casting: Mapping[fx.Node, Casting]) -> None:
    """Cast the operands of calls in whose place autocast chose another precision."""
    for node in list(program.graph.nodes):
        value = _first_number(node.meta.get("val"))
        if node.op != "call_function" or value is None:
            continue
        if value.device.type not in casting.get(node, ()) or _plain_type(node) is value.dtype:
            continue
        for source in node.all_input_nodes:
            operand = _first_number(source.meta.get("val"))
            if operand is not None and operand.dtype is not value.dtype:
                cast = insert_call(program, node, aten.to.dtype, (source, value.dtype))
                cast.meta["val"] = operand.to(value.dtype)
                node.replace_input_with(source, cast)


def _first_number(value: Any) -> Tensor | None:
    """The first floating-point tensor of a value."""
    tensors = (leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor))
    return next((tensor for tensor in tensors if tensor.is_floating_point()), None)


def _plain_type(node: fx.Node) -> torch.dtype | None:
    """The type of a call's result without autocast; None where types do not fit."""
    args, kwargs = pytree.tree_map_only(
        fx.Node, lambda source: source.meta["val"], (node.args, node.kwargs)
    )
    try:
        result = _first_number(node.target(*args, **kwargs))  # type: ignore[operator]
    except RuntimeError:  # how PyTorch refuses operands of different types
        return None
    return None if result is None else result.dtype
