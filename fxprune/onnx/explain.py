"""Why a program cannot be written as ONNX or run by ONNX Runtime, in plain words."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx

from fxprune.errors import ExportError, FxpruneError
from fxprune.graph.functionalize import state_of
from fxprune.graph.program import Program

UNUSUAL = (torch.bfloat16, torch.float16, torch.float64)
WITHOUT = "to get the smaller model and the report without an ONNX file, use --no-onnx"


def refuse_state(program: Program) -> None:
    """Fail if a program writes state: an ONNX file would forget it after every run.

    Raises:
        ExportError: the program writes parameters or buffers when it runs.

    """
    if names := state_of(program):
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        raise ExportError(
            f"the model writes state in forward ({shown}), and an ONNX file keeps none between "
            "runs; make the state an input and an output of forward, or do not write it in "
            f"evaluation mode; {WITHOUT}"
        )


def unusual_types(program: Program) -> str:
    """Name the floating-point types other than FP32 that a program computes in."""
    types = {value.dtype for node in program.graph.nodes for value in _tensors(node)}
    names = (str(dtype).removeprefix("torch.") for dtype in UNUSUAL if dtype in types)
    return " and ".join(names)


@contextmanager
def explained(program: Program) -> Iterator[None]:
    """Turn errors of the exporter and of ONNX Runtime into an ``ExportError``.

    Raises:
        ExportError: with the operator, its module, and what to do.

    """
    try:
        yield
    except FxpruneError:
        raise
    except Exception as error:
        raise ExportError(_explanation(program, error)) from error


def _explanation(program: Program, error: Exception) -> str:
    chain = " ".join(str(one) for one in _causes(error))
    advice = _advice(program)
    runtime = re.search(r"implementation for (\w+)\(", chain)
    operator = re.search(r"OpOverload\(op='([\w.:]+)'", chain)
    if runtime:
        what = f"ONNX Runtime cannot run the operator {runtime[1]} on these types"
    elif operator:
        where = _module_of(program, operator[1])
        what = f"the operator {operator[1]}{where} cannot be exported to ONNX"
    else:
        first = next(iter(str(_causes(error)[-1]).strip().splitlines()), type(error).__name__)
        what = f"the model cannot be exported to ONNX or run in ONNX Runtime ({first[:200]})"
    return f"{what}; {advice}{WITHOUT}"


def _causes(error: BaseException) -> list[BaseException]:
    """An error and what caused it, the deepest last."""
    found = [error]
    while (cause := found[-1].__cause__) is not None and cause not in found:
        found.append(cause)
    return found


def _advice(program: Program) -> str:
    """What usually helps, by the types of the values that the program computes."""
    types = {value.dtype: node for node in program.graph.nodes for value in _tensors(node)}
    for dtype in (torch.complex64, torch.complex128):
        if dtype in types:
            return (
                f"the model computes with complex numbers{_place(types[dtype])}, of which ONNX "
                "Runtime supports few: compute with real and imaginary parts, or "
            )
    if names := unusual_types(program):
        return f"the model computes in {names}: convert it with model.float(), or "
    return ""


def _tensors(node: fx.Node) -> list[Tensor]:
    value = node.meta.get("val")
    values: Any = value if isinstance(value, (tuple, list)) else [value]
    return [one for one in values if isinstance(one, Tensor)]


def _module_of(program: Program, operator: str) -> str:
    name = operator.replace("::", ".")
    found = (node for node in program.graph.nodes if str(node.target).startswith(name))
    node = next(found, None)
    return "" if node is None else _place(node)


def _place(node: fx.Node) -> str:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = str(stack[-1][0]) if stack else ""
    return f" (module {path})" if path else ""
