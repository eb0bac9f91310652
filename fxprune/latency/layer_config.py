"""Operators with all their sizes: the keys of the latency table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from fxprune.latency.layers import BINARY, LAYERS, Kind

Form = Literal["fp32", "int8"]
FORMS: tuple[Form, Form] = ("fp32", "int8")
Sizes = tuple[int, ...]


@dataclass(frozen=True, order=True)
class LayerConfig:
    """An operator with all its sizes; see ``fxprune.latency.layers.Layer``.

    Conversions are operators too: ``quantize`` and ``dequantize``, whose only form is INT8, and
    ``transpose``, which puts the channels of images last: INT8 kernels want them there. It also
    stands for the blocks of channels of FP32 convolutions, whose rearrangement takes about as long.
    """

    kind: Kind
    geometry: Sizes
    dims: Sizes

    @property
    def key(self) -> str:
        """Its name in the table, where the form stands before it."""
        return f"{self.kind} {list(self.geometry)} {list(self.dims)}".replace(", ", ",")

    @property
    def operands(self) -> tuple[Sizes, ...]:
        """The shapes of what it reads; of layers, the input and the weight or right matrix."""
        if self.kind == "linear":
            rows, inputs, outputs = self.dims
            return (rows, inputs), (inputs, outputs)
        if self.kind == "matmul":
            *leading, rows, inner, columns = self.dims
            right = (inner, columns) if self.geometry[1] else (*leading, inner, columns)
            return (*leading, rows, inner), right
        if self.kind in ("conv", "conv-transpose"):
            return self._of_convolution()
        if self.kind == "concat":
            axis, rank = self.geometry
            rest, parts = self.dims[: rank - 1], self.dims[rank - 1 :]
            return tuple((*rest[:axis], part, *rest[axis:]) for part in parts)
        if self.kind in BINARY:
            pairs = zip(self.dims, self.geometry, strict=True)
            return self.dims, tuple(1 if broadcast else size for size, broadcast in pairs)
        return (self.dims,)

    def _of_convolution(self) -> tuple[Sizes, Sizes]:
        rank = len(self.geometry) // 7
        channels, outputs, per_group = self.dims
        first = outputs if self.kind == "conv" else channels
        spatial, kernel = self.geometry[:rank], self.geometry[rank : 2 * rank]
        return (1, channels, *spatial), (first, per_group, *kernel)

    @property
    def constant(self) -> bool:
        """Whether the second operand is a weight."""
        return self.kind in LAYERS and (self.kind != "matmul" or bool(self.geometry[1]))

    @property
    def elements(self) -> int:
        """About how many numbers it reads and writes."""
        first, *rest = map(math.prod, self.operands)
        return 2 * first + sum(rest)

    @property
    def forms(self) -> tuple[Form, ...]:
        """The forms in which it can be timed."""
        return ("int8",) if self.kind in ("quantize", "dequantize") else FORMS


def conversion(kind: Literal["quantize", "dequantize"], elements: int) -> LayerConfig:
    """Return the conversion of so many numbers to INT8 or from it."""
    return LayerConfig(kind, (), (elements,))


_CONVOLUTION = (3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0)  # 3 x 3, padded by one
ANCHORS = (
    LayerConfig("conv", (32, 32, *_CONVOLUTION), (16, 16, 16)),
    LayerConfig("conv", (14, 14, *_CONVOLUTION), (96, 96, 1)),
    LayerConfig("conv", (8, 8, *_CONVOLUTION), (64, 64, 64)),
    LayerConfig("linear", (), (16, 256, 256)),
)
MICROSOFT = "com.microsoft"  # operators of ONNX Runtime beyond the ONNX standard
OPERATORS: Mapping[Kind, str] = {
    "linear": "MatMul",
    "matmul": "MatMul",
    "conv": "Conv",
    "conv-transpose": "ConvTranspose",
    "sigmoid": "Sigmoid",
    "silu": "QuickGelu",
    "hard-swish": "HardSwish",
    "hard-sigmoid": "HardSigmoid",
    "gelu": "Gelu",
    "add": "Add",
    "mul": "Mul",
    "concat": "Concat",
    "average": "GlobalAveragePool",
    "transpose": "Transpose",
    "quantize": "QuantizeLinear",
    "dequantize": "DequantizeLinear",
}


def operator(config: LayerConfig) -> tuple[str, Mapping[str, Any]]:
    """Return an operator's name in ONNX and its attributes."""
    name = OPERATORS[config.kind]
    if config.kind == "concat":
        return name, {"axis": config.geometry[0]}
    if config.kind == "hard-sigmoid":
        return name, {"alpha": 1 / 6, "beta": 0.5}
    if config.kind == "transpose":
        return name, {"perm": [0, *range(2, len(config.dims)), 1]}
    if config.kind == "silu":
        return name, {"domain": MICROSOFT, "alpha": 1.0}
    if config.kind not in ("conv", "conv-transpose"):
        return name, {}
    rank = len(config.geometry) // 7
    sizes = (rank, rank, rank, 2 * rank, rank, rank)
    starts = np.cumsum((0, *sizes))
    _, kernel, stride, padding, dilation, extra = (
        list(config.geometry[start : start + size])
        for start, size in zip(starts, sizes, strict=False)
    )
    channels, outputs, per_group = config.dims
    common = {"kernel_shape": kernel, "strides": stride, "pads": padding, "dilations": dilation}
    if config.kind == "conv":
        return name, {**common, "group": channels // per_group}
    return name, {**common, "group": outputs // per_group, "output_padding": extra}
