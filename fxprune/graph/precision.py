"""A program in double precision, to tell rounding from a fault."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxprune.graph.program import Program

WIDER = {
    torch.float32: torch.float64,
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.complex64: torch.complex128,
    torch.complex32: torch.complex128,
}


def in_double(program: Program) -> Program:
    """Return a copy that computes in double precision, its example inputs included."""
    copy = program.copy()
    copy.graph_module._apply(widened)
    for node in copy.graph.nodes:
        node.args, node.kwargs = pytree.tree_map(_wider_type, (node.args, node.kwargs))
    copy.example_inputs = widened(copy.example_inputs)
    copy.refresh()
    return copy


def widened(values: Any) -> Any:
    """Return a tree of values with its floating-point and complex tensors in double precision."""
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.to(_wider_type(tensor.dtype)), values)


def _wider_type(value: Any) -> Any:
    return WIDER.get(value, value) if isinstance(value, torch.dtype) else value
