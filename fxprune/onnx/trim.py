"""Remove redundant parts of an ONNX file: metadata, inferred types, default attributes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import onnx

ONES = {"Conv": ("strides", "dilations"), "ConvTranspose": ("strides", "dilations")}


def trim(model: Any) -> None:
    """Remove, in place, what every reader of an ``onnx_ir.Model`` can infer.

    The exporter's metadata repeats the name of every tensor, and the types of values between nodes
    follow from those of inputs and weights. In a file with 8-bit weights this is a tenth of the
    size.
    """
    graph = model.graph
    graph.metadata_props.clear()
    kept = {id(value) for value in (*graph.inputs, *graph.outputs)}
    for value in graph.initializers.values():
        value.metadata_props.clear()
        if id(value) not in kept:
            value.shape = value.type = None
    for node in graph.all_nodes():
        node.metadata_props.clear()
        version = node.version or model.opset_imports.get(node.domain)
        for name in tuple(_defaults(node, version)):
            del node.attributes[name]
    for node in graph:
        for value in node.outputs:
            value.metadata_props.clear()
            if id(value) not in kept:
                value.shape = value.type = None


def _defaults(node: Any, version: int | None) -> Iterator[str]:
    """Yield the names of a node's attributes that have their default value."""
    if version is None or not onnx.defs.has(node.op_type, version, node.domain):
        return
    formal = onnx.defs.get_schema(node.op_type, version, node.domain).attributes
    for name, attribute in node.attributes.items():
        if attribute.is_ref() or name not in formal:
            continue
        default = formal[name].default_value
        if name in ONES.get(node.op_type, ()):
            if all(item == 1 for item in attribute.value):
                yield name
        elif default.type and _value(onnx.helper.get_attribute_value(default)) == attribute.value:
            yield name


def _value(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else value
