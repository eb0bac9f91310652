"""Operators of ONNX Runtime beyond the ONNX standard, where they are faster than standard ones.

``MatMulIntegerToFloat`` adds the bias of an INT8 linear layer whose result is FP32; between
standard operators ONNX Runtime adds it in a second step. ``QuickGelu`` computes ``x * sigmoid(x)``
in one step where ``x`` comes from INT8; in FP32 ONNX Runtime puts it in by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from onnx.defs import OpSchema
from onnxscript import opset20
from onnxscript.values import Op, Opset
from torch import Tensor, fx
from torch.nn import functional as F

from fxprune.graph.custom_ops import DEQUANTIZE, dequantize
from fxprune.graph.node_args import argument, packet_of
from fxprune.graph.program import Program, shape_of
from fxprune.graph.surgery import insert_call, replace_node

aten = torch.ops.aten
DOMAIN = "com.microsoft"


def _operator(name: str, inputs: Mapping[str, str], *attributes: str) -> Op:
    """Describe an operator of ONNX Runtime to ONNX Script.

    Args:
        name: in the domain.
        inputs: types by name; a name that ends in a question mark is optional.
        attributes: names of numbers.

    """
    option, single = OpSchema.FormalParameterOption.Optional, OpSchema.FormalParameterOption.Single
    schema = OpSchema(
        name,
        DOMAIN,
        1,
        inputs=[
            OpSchema.FormalParameter(
                key.rstrip("?"), type_, param_option=option if key.endswith("?") else single
            )
            for key, type_ in inputs.items()
        ],
        outputs=[OpSchema.FormalParameter("Y", "tensor(float)")],
        attributes=[
            OpSchema.Attribute(key, OpSchema.AttrType.FLOAT, required=False) for key in attributes
        ],
    )
    return Op(Opset(DOMAIN, 1), name, schema)


QUICK_GELU = _operator("QuickGelu", {"X": "tensor(float)"}, "alpha")
MATMUL_INTEGER_TO_FLOAT = _operator(
    "MatMulIntegerToFloat",
    {
        "A": "tensor(uint8)", "B": "tensor(int8)", "a_scale": "tensor(float)",
        "b_scale": "tensor(float)", "a_zero_point?": "tensor(uint8)",
        "b_zero_point?": "tensor(int8)", "bias?": "tensor(float)",
    },
)  # fmt: skip


@torch.library.custom_op("fxprune::integer_linear", mutates_args=())
def integer_linear(
    x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor, x_zero: Tensor, bias: Tensor
) -> Tensor:
    """Compute a linear layer of INT8 numbers with one scale, and weights with one per output."""
    exact = dequantize(weight, weight_scale, torch.zeros_like(weight_scale, dtype=weight.dtype), 0)
    return F.linear(dequantize(x, x_scale, x_zero, -1), exact, bias)


@integer_linear.register_fake
def _(
    x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor, x_zero: Tensor, bias: Tensor
) -> Tensor:
    return bias.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.custom_op("fxprune::fused_silu", mutates_args=())
def fused_silu(x: Tensor) -> Tensor:
    """Compute ``x * sigmoid(x)``."""
    return F.silu(x)


@fused_silu.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


INTEGER_LINEAR = torch.ops.fxprune.integer_linear.default
FUSED_SILU = torch.ops.fxprune.fused_silu.default


def _integer_linear(
    x: Any, weight: Any, x_scale: Any, weight_scale: Any, x_zero: Any, bias: Any
) -> Any:
    right = opset20.Transpose(weight, perm=[1, 0])
    return MATMUL_INTEGER_TO_FLOAT(x, right, x_scale, weight_scale, x_zero, None, bias)


def _silu(x: Any) -> Any:
    return QUICK_GELU(x, alpha=1.0)


RUNTIME_TRANSLATIONS: Mapping[Any, Callable[..., Any]] = {
    INTEGER_LINEAR: _integer_linear,
    FUSED_SILU: _silu,
}


def use_runtime_operators(program: Program) -> tuple[str, ...]:
    """Rewrite what ONNX Runtime has faster operators for; return the names of these in ONNX."""
    used = set()
    for node in list(program.graph.nodes):
        if node.target is aten.silu.default and _comes_from_int8(node.args[0]):
            replace_node(program, node, insert_call(program, node, FUSED_SILU, node.args[:1]))
            used.add(f"{DOMAIN}.QuickGelu")
        elif packet_of(node) is aten.linear and _adds_after_rescaling(program, node):
            x, weight, bias = (argument(node, name) for name in ("input", "weight", "bias"))
            (codes, scale, zero, _), (weights, scales, _, _) = x.args, weight.args
            args = (codes, weights, scale, scales, zero, bias)
            replace_node(program, node, insert_call(program, node, INTEGER_LINEAR, args))
            used.add(f"{DOMAIN}.MatMulIntegerToFloat")
    return tuple(sorted(used))


def _comes_from_int8(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is DEQUANTIZE and bool(node.args[3] == -1)


def _adds_after_rescaling(program: Program, layer: fx.Node) -> bool:
    """Whether a linear layer reads INT8 numbers and adds an FP32 bias to its rescaled sums."""
    x, weight, bias = (argument(layer, name) for name in ("input", "weight", "bias"))
    stored = isinstance(bias, fx.Node) and bias.op == "get_attr"
    if not stored or not _comes_from_int8(x) or len(shape_of(layer)) < 3:
        return False
    if not isinstance(weight, fx.Node) or weight.target is not DEQUANTIZE or weight.args[3] != 0:
        return False
    zero: Any = weight.args[2]
    return not bool(program.tensor(str(zero.target)).any())
