"""Where a node is, in words that a user can act on."""

from __future__ import annotations

from torch import fx


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
