"""ONNX models that run operators of the latency table, each on inputs of its own shapes.

In FP32 an operator is alone. In INT8 it is between the conversions that ONNX Runtime fuses with it;
linear layers and matrix products then return FP32 values, as in networks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from fxprune.latency.layer_config import MICROSOFT, Form, LayerConfig, Sizes, operator

OPSET = 20
SCALE = 0.02
REPEATED = 1021  # random numbers that weights repeat, so that kits compress well
TYPES: Mapping[Form, int] = {"fp32": TensorProto.FLOAT, "int8": TensorProto.UINT8}
Entry = tuple[LayerConfig, Form]


def model_of(entries: Sequence[Entry]) -> bytes:
    """Build an ONNX model that runs each entry once."""
    model = _Model()
    for number, (config, form) in enumerate(entries):
        if config.kind in ("quantize", "dequantize"):
            model.add_conversion(number, config)
        elif config.kind == "transpose":
            model.add_transpose(number, config, form)
        elif form == "fp32":
            model.add_fp32(number, config)
        elif config.kind in ("linear", "matmul"):
            model.add_product(number, config)
        elif config.kind in ("silu", "hard-swish", "hard-sigmoid"):
            model.add_activation(number, config)
        else:
            model.add_int8(number, config)
    return model.encoded()


class _Model:
    """An ONNX model that grows by operators in either form."""

    def __init__(self) -> None:
        self._random = np.random.default_rng(0)
        self._nodes: list[Any] = []
        self._weights: list[Any] = []
        self._outputs: list[Any] = []
        self._inputs: dict[str, Any] = {}
        self._store("scale", np.float32(SCALE))
        self._store("zero", np.uint8(0))

    def add_fp32(self, number: int, config: LayerConfig) -> None:
        read = self._read(number, config, "fp32")
        if config.kind == "hard-swish":  # ONNX Runtime runs it in two parts
            self._node("HardSigmoid", read, f"layer{number}_gate", alpha=1 / 6, beta=0.5)
            self._add("Mul", [*read, f"layer{number}_gate"], f"layer{number}", TensorProto.FLOAT)
            return
        name, attributes = operator(config)
        self._add(name, read, f"layer{number}", TensorProto.FLOAT, **attributes)

    def add_int8(self, number: int, config: LayerConfig) -> None:
        """Add an operator between conversions; a layer with its bias, and with a ReLU after it."""
        read = self._read(number, config, "int8")
        last = f"layer{number}"
        name, attributes = operator(config)
        if config.constant:
            outputs = config.dims[1]
            read.append(self._decoded(f"b{number}", np.zeros(outputs, np.int32), 0, SCALE**2))
        self._node(name, read, last, **attributes)
        if config.constant:
            self._node("Relu", [last], f"relu{number}")
            last = f"relu{number}"
        ends = [last, "scale", "zero"]
        self._add("QuantizeLinear", ends, f"out{number}", TensorProto.UINT8)

    def add_activation(self, number: int, config: LayerConfig) -> None:
        """Add an activation as ``quantization.activations`` writes it for INT8."""
        (read,) = self._read(number, config, "int8")
        last = f"layer{number}_gate"
        if config.kind == "silu":
            self._node("Sigmoid", [read], last)
        else:
            three = self._decoded(f"three{number}", np.full(1, 150, np.uint8), 0, SCALE)
            self._node("Add", [read, three], last)
        ends = ["scale", "zero"]
        if config.kind != "hard-sigmoid":
            self._node("QuantizeLinear", [last, *ends], f"quantized{number}")
            self._node("DequantizeLinear", [f"quantized{number}", *ends], f"gate{number}")
            last = f"layer{number}"
            self._node("Mul", [read, f"gate{number}"], last)
        self._add("QuantizeLinear", [last, *ends], f"out{number}", TensorProto.UINT8)

    def add_product(self, number: int, config: LayerConfig) -> None:
        """Add a product of INT8 numbers whose sums go on as FP32."""
        read = self._read(number, config, "int8")
        if config.kind == "linear":
            bias = np.zeros(config.dims[2], np.int32)
            read.append(self._decoded(f"b{number}", bias, 0, SCALE**2))
        kind = "Gemm" if config.kind == "linear" else "MatMul"
        self._add(kind, read, f"layer{number}", TensorProto.FLOAT)

    def add_conversion(self, number: int, config: LayerConfig) -> None:
        forward = config.kind == "quantize"
        form: Form = "fp32" if forward else "int8"
        read = [self._source(config.dims, form), "scale", "zero"]
        type_ = TensorProto.UINT8 if forward else TensorProto.FLOAT
        self._add(operator(config)[0], read, f"layer{number}", type_)

    def add_transpose(self, number: int, config: LayerConfig, form: Form) -> None:
        name, attributes = operator(config)
        source = self._source(config.dims, form)
        self._add(name, [source], f"layer{number}", TYPES[form], **attributes)

    def encoded(self) -> bytes:
        inputs = list(self._inputs.values())
        graph = helper.make_graph(self._nodes, "layers", inputs, self._outputs, self._weights)
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        encoded: bytes = model.SerializeToString()
        return encoded

    def _read(self, number: int, config: LayerConfig, form: Form) -> list[str]:
        """Name an operator's operands: inputs of the model, and a weight of its own."""
        first, *rest = config.operands
        if config.constant:
            (shape,) = rest
            rest = []
        read = [
            self._operand(f"in{number}_{place}", shape_, place, form)
            for place, shape_ in enumerate((first, *rest))
        ]
        return [*read, self._weight(number, config, shape, form)] if config.constant else read

    def _operand(self, name: str, shape: Sizes, place: int, form: Form) -> str:
        source = self._source(shape, form, place)
        if form == "fp32":
            return source
        self._node("DequantizeLinear", [source, "scale", "zero"], name)
        return name

    def _weight(self, number: int, config: LayerConfig, shape: Sizes, form: Form) -> str:
        if form == "fp32":
            values = np.resize(self._random.standard_normal(REPEATED, np.float32), shape)
            self._store(f"w{number}", values)
            return f"w{number}"
        axis = 0 if config.kind == "conv" else 1
        codes = np.resize(self._random.integers(-60, 60, REPEATED).astype(np.int8), shape)
        return self._decoded(f"w{number}", codes, axis, SCALE)

    def _store(self, name: str, values: Any) -> None:
        self._weights.append(numpy_helper.from_array(np.asarray(values), name))

    def _source(self, shape: Sizes, form: Form, place: int = 0) -> str:
        name = f"{form}_{place}_{'_'.join(map(str, shape))}"
        self._inputs[name] = helper.make_tensor_value_info(name, TYPES[form], shape)
        return name

    def _decoded(self, name: str, codes: Any, axis: int, scale: float) -> str:
        size = codes.shape[axis]
        self._store(name, codes)
        self._store(f"{name}_scale", np.full(size, scale, np.float32))
        self._store(f"{name}_zero", np.zeros(size, codes.dtype))
        read = [name, f"{name}_scale", f"{name}_zero"]
        self._node("DequantizeLinear", read, f"{name}_decoded", axis=axis)
        return f"{name}_decoded"

    def _node(self, kind: str, inputs: list[str], name: str, **attributes: Any) -> None:
        self._nodes.append(helper.make_node(kind, inputs, [name], name, **attributes))

    def _add(self, kind: str, inputs: list[str], name: str, type_: int, **attributes: Any) -> None:
        self._node(kind, inputs, name, **attributes)
        self._outputs.append(helper.make_tensor_value_info(name, type_, None))
