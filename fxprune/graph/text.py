"""A program's graph as text: compact, stable between runs, meant to be read and compared."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from fxprune.graph.program import Program


def graph_text(program: Program) -> str:
    """Write a program's graph, one line per value; parameters stand where they are read.

    A line is ``name: shape = operator(arguments)``; shapes are those of the example inputs, and a
    type other than ``float32`` is named. A parameter is written ``<name shape>``.

    >>> import fxprune
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU())
    >>> print(graph_text(fxprune.trace(model, (torch.randn(4, 3),))))
    input_1: 4x3 = input
    linear: 4x2 = linear(input_1, <0.weight 2x3>, <0.bias 2>)
    relu: 4x2 = relu(linear)
    return relu
    """
    lines = []
    for node in program.graph.nodes:
        if node.op == "placeholder":
            lines.append(f"{node.name}: {_value(node.meta.get('val'))} = input")
        elif node.op == "call_function":
            lines.append(f"{node.name}: {_value(node.meta.get('val'))} = {_call(node)}")
        elif node.op == "output":
            lines.append(f"return {_outputs(node.args[0])}")
    return "\n".join(lines)


def _call(node: fx.Node) -> str:
    arguments = [_argument(value) for value in node.args]
    arguments += [f"{key}={_argument(value)}" for key, value in node.kwargs.items()]
    return f"{_operator(node.target)}({', '.join(arguments)})"


def _operator(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return str(target).removeprefix("aten.").removesuffix(".default")
    return str(getattr(target, "__name__", target))


def _argument(value: Any) -> str:
    match value:
        case fx.Node(op="get_attr"):
            return f"<{value.target} {_value(value.meta.get('val'))}>"
        case fx.Node():
            return value.name
        case list() | tuple():
            return f"[{', '.join(_argument(item) for item in value)}]"
        case _:
            return str(value)


def _outputs(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return ", ".join(_argument(item) for item in value)
    return _argument(value)


def _value(value: Any) -> str:
    match value:
        case Tensor():
            shape = "x".join(str(size) for size in value.shape) or "scalar"
            if value.dtype == torch.float32:
                return shape
            return f"{str(value.dtype).removeprefix('torch.')} {shape}"
        case list() | tuple():
            return f"({', '.join(_value(item) for item in value)})"
        case None:
            return "none"
        case _:
            return type(value).__name__.removeprefix("Sym").lower()
