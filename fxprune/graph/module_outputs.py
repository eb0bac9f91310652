"""The outputs of a model's modules, in the model itself and in a program captured from it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxprune.graph.comparison import relative_error
from fxprune.graph.program import Program


def first_differing_module(
    model: nn.Module, program: Program, inputs: tuple[Any, ...], limit: float
) -> str | None:
    """Name the first module, in the order in which they finish, whose output differs.

    Args:
        model: it gets hooks.
        program: captured from it.
        inputs: of one call; they may be written into.
        limit: the largest relative error that is no difference.

    """
    outputs: dict[str, Any] = {}
    for name, module in model.named_modules():
        module.register_forward_hook(_recorder(outputs, name))
    copies = pytree.tree_map_only(Tensor, torch.clone, inputs)
    try:
        model(*inputs)
        values = _last_values(program, copies)
    except Exception:  # this only helps a message; the caller reports the fault itself
        return None
    for name, output in outputs.items():
        if isinstance(output, Tensor) and isinstance(value := values.get(name), Tensor):
            same_shape = value.shape == output.shape
            if name and same_shape and not relative_error(output, value) <= limit:
                return name
    return None


def _recorder(outputs: dict[str, Any], name: str) -> Any:
    def record(module: nn.Module, args: Any, output: Any) -> None:
        if name not in outputs:
            outputs[name] = pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), output)

    return record


def _last_values(program: Program, inputs: tuple[Any, ...]) -> dict[str, Any]:
    """Run a program; return, by the path of a module, the last value of its first call."""
    found: dict[str, Any] = {}

    class Recording(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            for key, (path, _) in (n.meta.get("nn_module_stack") or {}).items():
                if "@" not in str(key):
                    found[str(path)] = value
            return value

    leaves = pytree.tree_leaves(inputs)
    Recording(program.graph_module).run(*leaves, enable_io_processing=False)
    return found
