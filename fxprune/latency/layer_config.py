"""Layers with all their sizes, and ONNX models that run them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from fxprune.latency.layers import Kind

OPSET = 20


@dataclass(frozen=True, order=True)
class Shape:
    """A layer with all its sizes; see ``fxprune.latency.layers.Layer``."""

    kind: Kind
    geometry: tuple[int, ...]
    dims: tuple[int, ...]

    @property
    def key(self) -> str:
        """Its name in the table."""
        return f"{self.kind} {list(self.geometry)} {list(self.dims)}".replace(", ", ",")

    @property
    def operands(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of what it reads: the input, and the weight or right matrix."""
        if self.kind == "linear":
            rows, inputs, outputs = self.dims
            return (rows, inputs), (inputs, outputs)
        if self.kind == "matmul":
            *leading, rows, inner, columns = self.dims
            right = (inner, columns) if self.geometry[1] else (*leading, inner, columns)
            return (*leading, rows, inner), right
        rank = len(self.geometry) // 7
        channels, outputs, per_group = self.dims
        first = outputs if self.kind == "conv" else channels
        spatial, kernel = self.geometry[:rank], self.geometry[rank : 2 * rank]
        return (1, channels, *spatial), (first, per_group, *kernel)

    @property
    def constant(self) -> bool:
        """Whether the second operand is a weight."""
        return self.kind != "matmul" or bool(self.geometry[1])

    @property
    def elements(self) -> int:
        """About how many numbers it reads and writes."""
        left, right = self.operands
        return 2 * math.prod(left) + math.prod(right)


_CONVOLUTION = (3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0)  # 3 x 3, padded by one
ANCHORS = (
    Shape("conv", (32, 32, *_CONVOLUTION), (16, 16, 16)),
    Shape("conv", (14, 14, *_CONVOLUTION), (96, 96, 1)),
    Shape("conv", (8, 8, *_CONVOLUTION), (64, 64, 64)),
    Shape("linear", (), (16, 256, 256)),
)


def model_of(shapes: Sequence[Shape]) -> bytes:
    """Build an ONNX model that runs each layer once, on an input of its own shape."""
    random = np.random.default_rng(0)
    nodes, weights, outputs = [], [], []
    inputs: dict[tuple[int, ...], Any] = {}

    def source(shape: tuple[int, ...]) -> str:
        name = "x" + "_".join(map(str, shape))
        inputs[shape] = helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        return name

    for number, shape in enumerate(shapes):
        left, right = shape.operands
        name = f"w{number}"
        if shape.constant:
            values = random.standard_normal(right, dtype=np.float32)
            weights.append(numpy_helper.from_array(values, name))
        operands = [source(left), name if shape.constant else source(right)]
        kind, attributes = operator(shape)
        nodes.append(
            helper.make_node(kind, operands, [f"layer{number}"], f"layer{number}", **attributes)
        )
        outputs.append(helper.make_tensor_value_info(f"layer{number}", TensorProto.FLOAT, None))
    graph = helper.make_graph(nodes, "layers", list(inputs.values()), outputs, weights)
    opset = helper.make_opsetid("", OPSET)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=10)
    encoded: bytes = model.SerializeToString()
    return encoded


def operator(shape: Shape) -> tuple[str, Mapping[str, Any]]:
    """Return a layer's ONNX operator and its attributes."""
    if shape.kind in ("linear", "matmul"):
        return "MatMul", {}
    rank = len(shape.geometry) // 7
    sizes = (rank, rank, rank, 2 * rank, rank, rank)
    starts = np.cumsum((0, *sizes))
    _, kernel, stride, padding, dilation, extra = (
        list(shape.geometry[start : start + size])
        for start, size in zip(starts, sizes, strict=False)
    )
    channels, outputs, per_group = shape.dims
    common = {"kernel_shape": kernel, "strides": stride, "pads": padding, "dilations": dilation}
    if shape.kind == "conv":
        return "Conv", {**common, "group": channels // per_group}
    return "ConvTranspose", {**common, "group": outputs // per_group, "output_padding": extra}
