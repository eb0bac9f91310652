"""A program in another precision: in double, to tell rounding from a fault, or in single."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxprune.graph.program import Program

Types = Mapping[torch.dtype, torch.dtype]
WIDER: Types = {
    torch.float32: torch.float64,
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.complex64: torch.complex128,
    torch.complex32: torch.complex128,
}
SINGLE: Types = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float64: torch.float32,
    torch.complex128: torch.complex64,
}


def in_double(program: Program) -> Program:
    """Return a copy that computes in double precision, its example inputs included."""
    return _converted(program, WIDER)


def in_single(program: Program) -> Program:
    """Return a copy that computes in single precision, its example inputs included."""
    return _converted(program, SINGLE)


def _converted(program: Program, types: Types) -> Program:
    copy = program.copy()
    copy.graph_module._apply(lambda tensor: _with_types(tensor, types))
    for node in copy.graph.nodes:
        node.args, node.kwargs = pytree.tree_map(
            lambda value: types.get(value, value) if isinstance(value, torch.dtype) else value,
            (node.args, node.kwargs),
        )
    copy.example_inputs = _with_types(copy.example_inputs, types)
    copy.refresh()
    return copy


def widened(values: Any) -> Any:
    """Return a tree of values with its floating-point and complex tensors in double precision."""
    return _with_types(values, WIDER)


def narrowed(values: Any) -> Any:
    """Return a tree of values with its floating-point and complex tensors in single precision."""
    return _with_types(values, SINGLE)


def _with_types(values: Any, types: Types) -> Any:
    return pytree.tree_map_only(
        Tensor, lambda tensor: tensor.to(types.get(tensor.dtype, tensor.dtype)), values
    )
