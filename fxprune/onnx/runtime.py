"""Running ONNX files in ONNX Runtime, and programs beside them."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxprune.graph.comparison import relative_error
from fxprune.graph.operators import operator_of
from fxprune.graph.program import Program


def run(program: Program, inputs: tuple[Any, ...]) -> list[Tensor]:
    """Return the tensors that a program returns."""
    with torch.no_grad():
        return [t for t in pytree.tree_leaves(program(*inputs)) if isinstance(t, Tensor)]


def session_of(path: Path, *, fused: bool = True) -> onnxruntime.InferenceSession:
    """Open an ONNX file on the CPU; ``fused=False`` runs every node of the file as it stands."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if not fused:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def apart(expected: Sequence[Any], found: Sequence[Any], least: Sequence[float] = ()) -> float:
    """The largest relative difference between outputs whose sizes count as ``least`` at least."""
    worst = 0.0
    for left, right, size in zip(expected, found, least or [0.0] * len(expected), strict=True):
        left, right = torch.as_tensor(left), torch.as_tensor(right)
        error = relative_error(left, right)
        largest = float(left.abs().max()) if size and left.numel() else size
        worst = max(worst, error * largest / size if 0 < largest < size else error)
    return worst


def least_sizes(program: Program) -> list[float]:
    """By output tensor, how large its largest value counts at least: 1 of what lies in -1..1."""
    output = program.graph.output_node()
    leaves = [leaf for leaf in pytree.tree_leaves(output.args[0]) if isinstance(leaf, fx.Node)]
    made = [leaf for leaf in leaves if isinstance(leaf.meta.get("val"), Tensor)]
    return [float(operator_of(_origin(node)).bounded) for node in made]


def _origin(node: fx.Node) -> fx.Node:
    """What a value was before its elements were moved."""
    while operator_of(node).moves_data or operator_of(node).identity:
        node = node.all_input_nodes[0]
    return node


def feeds(session: onnxruntime.InferenceSession, inputs: tuple[Any, ...]) -> dict[str, Any]:
    """Name a program's inputs as an ONNX Runtime session does, in the types that it takes."""
    tensors = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
    return {
        item.name: (tensor.float() if item.type == "tensor(float)" else tensor).cpu().numpy()
        for item, tensor in zip(session.get_inputs(), tensors, strict=False)
    }


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide the exporter's progress lines and its warnings about its own internals."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
