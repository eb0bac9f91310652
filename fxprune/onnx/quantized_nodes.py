"""Our custom operators in ONNX, and which quantised nodes ONNX Runtime fuses to INT8."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from onnxscript import opset20 as op
from torch import Tensor, fx

from fxprune.graph.custom_ops import DEQUANTIZE, QUANTIZE
from fxprune.graph.operators import operator_of
from fxprune.graph.program import Program
from fxprune.graph.surgery import insert_call

aten = torch.ops.aten

# Operators that ONNX Runtime can fuse; between INT8 values an unfused one computes in FP32.
FUSIBLE = frozenset({"Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "Add"})
CODES = frozenset({"QuantizeLinear", "DequantizeLinear"})


@torch.library.custom_op("fxprune::global_average", mutates_args=())
def global_average(x: Tensor) -> Tensor:
    """Average over all positions, which stay as dimensions of size 1."""
    return x.mean(tuple(range(2, x.dim())), keepdim=True)


@global_average.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:2], *[1] * (x.dim() - 2)))


def _quantize(x: Any, scale: Any, zero_point: Any, axis: int) -> Any:
    if axis == -1:  # one scale for all values
        return op.QuantizeLinear(x, scale, zero_point)
    return op.QuantizeLinear(x, scale, zero_point, axis=axis)


def _dequantize(codes: Any, scale: Any, zero_point: Any, axis: int) -> Any:
    if axis == -1:
        return op.DequantizeLinear(codes, scale, zero_point)
    return op.DequantizeLinear(codes, scale, zero_point, axis=axis)


def _global_average(x: Any) -> Any:
    return op.GlobalAveragePool(x)


GLOBAL_AVERAGE = torch.ops.fxprune.global_average.default
TRANSLATIONS: Mapping[Any, Callable[..., Any]] = {
    QUANTIZE: _quantize,
    DEQUANTIZE: _dequantize,
    GLOBAL_AVERAGE: _global_average,
}


def is_quantized(program: Program) -> bool:
    """Whether a program computes in INT8."""
    return any(node.target in (QUANTIZE, DEQUANTIZE) for node in program.graph.nodes)


def shield_floats(program: Program) -> None:
    """Keep ONNX Runtime from quantising layers that must stay in FP32.

    Between INT8 inputs and outputs, its optimiser (WeightBiasQuantization) also rounds FP32 weights
    to 8 bits with one scale per tensor. A clamp to the range of the INT8 values prevents this and
    changes no value.
    """
    for node in list(program.graph.nodes):
        x, weight = (*node.args, None, None)[:2]
        if not operator_of(node).is_layer or not isinstance(x, fx.Node):
            continue
        stored = isinstance(weight, fx.Node) and weight.op == "get_attr"
        if not stored or x.target is not DEQUANTIZE or x.args[3] != -1:
            continue
        scale, zero = (program.tensor(str(item.target)) for item in x.args[1:3])  # type: ignore[union-attr]
        limits = torch.iinfo(zero.dtype)
        ends = [float(scale) * (code - int(zero)) for code in (limits.min, limits.max)]
        clamp = insert_call(program, node, aten.clamp.default, (x, *ends))
        node.replace_input_with(x, clamp)


@dataclass(frozen=True)
class Fusion:
    """Which quantised nodes compute in INT8.

    Attributes:
        fused: for each operator, the number of nodes that compute in INT8.
        unfused: nodes between INT8 values that compute in FP32, named by their weight or their
            own name.

    """

    fused: Mapping[str, int]
    unfused: tuple[str, ...]


def inspect_fusion(path: str | Path) -> Fusion:
    """Optimise an ONNX file with ONNX Runtime and inspect the remaining nodes."""
    with tempfile.TemporaryDirectory(prefix="fxprune-") as folder:
        optimised = Path(folder) / "optimised.onnx"
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(optimised)
        options.log_severity_level = 3
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        graph = onnx.load(str(optimised)).graph
    makers = {name: node for node in graph.node for name in node.output}
    counts: Counter[str] = Counter()
    unfused = []
    for node in graph.node:
        if _computes_on_codes(node.op_type):
            counts[node.op_type] += 1
        elif node.op_type in FUSIBLE and _reads_codes(node, makers):
            unfused.append(_name(node, makers))
    return Fusion(dict(sorted(counts.items())), tuple(unfused))


def _computes_on_codes(operator: str) -> bool:
    fused = operator.startswith("QLinear") or "Integer" in operator or operator == "QGemm"
    return fused and operator not in CODES


def _reads_codes(node: onnx.NodeProto, makers: Mapping[str, onnx.NodeProto]) -> bool:
    """Whether a node was meant to run in INT8: its weight, or all its inputs, are dequantised."""
    sources = [makers[name] for name in node.input if name in makers]
    codes = [source for source in sources if source.op_type == "DequantizeLinear"]
    if node.op_type == "Add":
        return len(codes) == 2
    if len(codes) == len(node.input) == 2 and all(one.input[0] in makers for one in codes):
        return True  # a product of activations
    return any(source.input[0] not in makers for source in codes) and len(codes) > 1


def _name(node: onnx.NodeProto, makers: Mapping[str, onnx.NodeProto]) -> str:
    """The stored weight that a node reads, or its own name."""
    for name in node.input[1:2]:
        source = makers.get(name)
        if source is not None and source.input and source.input[0] not in makers:
            return str(source.input[0])
    return str(node.name)
