"""Where a node is, in words that a user can act on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import fx

from fxprune.structure.labels import Labels


def describe(node: fx.Node) -> str:
    """Say where a node is: its operator, name, module path and source line."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = stack[-1][0] if stack else ""
    trace = node.meta.get("stack_trace") or ""
    lines = [line.strip() for line in trace.splitlines() if line.strip().startswith("File ")]
    own = [line for line in lines if "/torch/nn/" not in line]  # the user's rather than torch's
    lines = own or lines
    parts = [f"{node.target} at node {node.name}"]
    if path:
        parts.append(f"module {path}")
    if lines:
        parts.append(lines[-1].removeprefix("File ").replace(", in forward", ""))
    return ", ".join(parts)


def fixed_size(node: fx.Node, operand: Labels, dim: int, values: Mapping[fx.Node, Any]) -> str:
    """Say which operand's dimension a node meets that cannot shrink, and why it cannot.

    Args:
        node: where dimensions meet.
        operand: the labels of the operand.
        dim: the dimension along which it has none.
        values: the labels of every value so far.

    """
    source = next((item for item in node.all_input_nodes if values.get(item) is operand), None)
    if source is None:
        return "it meets a dimension whose size is fixed"
    why = _fixed_by(source, lambda value: bool(getattr(values.get(value), "entries", ())))
    return f"it meets dimension {dim} of {source.name}, {why}"


def _fixed_by(node: fx.Node, labelled: Callable[[fx.Node], bool]) -> str:
    """Follow a value to where nothing removable enters."""
    current = node
    while current.op not in ("placeholder", "get_attr"):
        sources = current.all_input_nodes
        if not sources:
            return f"computed by {current.target} without weights"
        if any(map(labelled, sources)):
            return f"whose size is fixed by {describe(current)}"
        current = sources[0]
    if current.op == "get_attr":
        return f"read from {current.target}"
    if current is node:
        return "an input of the model"
    return f"computed from the model's input {current.name}"
