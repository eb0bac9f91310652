"""Where a program first gives NaN."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxprune.graph.functionalize import state_kept
from fxprune.graph.program import Program


def first_nan(program: Program, inputs: tuple[Any, ...]) -> str | None:
    """Return where NaN first appears if an output has any: a module, an input or a tensor.

    NaN that no output shows, as in rows that are masked later, does not count.
    """
    with torch.no_grad(), state_kept(program):
        if not any(map(_has_nan, pytree.tree_leaves(program(*inputs)))):
            return None
        search = _Search(program.graph_module)
        search.run(*pytree.tree_leaves(inputs), enable_io_processing=False)
    return search.found or "an output"


class _Search(fx.Interpreter):
    found: str | None = None

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if self.found is None and any(map(_has_nan, pytree.tree_leaves(value))):
            self.found = _place(n)
        return value


def _place(node: fx.Node) -> str:
    if node.op == "placeholder":
        return f"the input {node.name}"
    if node.op == "get_attr":
        return f"the tensor {node.target}"
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = str(stack[-1][0]) if stack else ""
    return f"the output of {node.target}" + (f" (module {path})" if path else "")


def _has_nan(value: Any) -> bool:
    return isinstance(value, Tensor) and bool(value.isnan().any())
