"""Parametrised weights become plain ones: what is trained and removed is the weight itself.

``torch.nn.utils.parametrize`` (weight norm, spectral norm, orthogonal maps) and the older
``weight_norm`` compute a weight from other parameters at every call. Removing one of its input
channels there would change the norm of all others; of the weight itself it takes a slice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from fxprune.graph.program import Program
from fxprune.graph.surgery import drop_unused, read_tensor, replace_node, set_tensor

MARK = ".parametrizations."


def fold_parametrisations(program: Program) -> int:
    """Replace every computed weight by a parameter of the weight's own name.

    Returns:
        How many calls now read such a parameter.

    """
    values: dict[fx.Node, tuple[str, Tensor]] = {}
    for node in program.graph.nodes:
        if (name := _weight_name(node)) is None:
            continue
        found = _evaluate(program, node, values)
        if isinstance(found, Tensor):
            values[node] = name, found
    results = [node for node in values if any(user not in values for user in node.users)]
    for node in results:
        name, value = values[node]
        set_tensor(program, name, value.clone().requires_grad_(value.is_floating_point()))
        replace_node(program, node, read_tensor(program, name, node))
    if results:
        drop_unused(program)
    return len(results)


def _weight_name(node: fx.Node) -> str | None:
    """Return the name of the weight that a call helps to compute; None if it does no such thing."""
    if node.op != "call_function":
        return None
    if node.target is torch.ops.aten._weight_norm.default:
        source = node.args[0]
        if (
            isinstance(source, fx.Node)
            and source.op == "get_attr"
            and MARK not in str(source.target)
        ):
            return str(source.target).removesuffix("_v")
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = str(stack[-1][0]) if stack else ""
    owner, mark, rest = path.rpartition(MARK)
    if not mark:
        return None
    return f"{owner}.{rest.partition('.')[0]}" if owner else rest.partition(".")[0]


def _evaluate(program: Program, node: fx.Node, values: dict[fx.Node, tuple[str, Tensor]]) -> Any:
    """Compute a call on parameters alone; None if it reads anything else."""

    def read(source: fx.Node) -> Any:
        if source in values:
            return values[source][1]
        return program.tensor(str(source.target))

    known = all(source in values or source.op == "get_attr" for source in node.all_input_nodes)
    if not known or not callable(node.target):
        return None
    with torch.no_grad():
        args, kwargs = fx.map_arg((node.args, node.kwargs), read)
        return node.target(*args, **kwargs)
