"""Activations as operators that have INT8 kernels in ONNX Runtime.

``silu(x)`` is ``x * sigmoid(x)``, and ``hardsigmoid(x)`` is ``relu6(x + 3) / 6``: a sum with a
number, whose clamp and division become part of the scale of the quantised result.
``hardswish(x)`` is ``x * hardsigmoid(x)``.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import fx

from fxprune.graph.node_args import packet_of
from fxprune.graph.program import Program
from fxprune.graph.surgery import insert_call, read_tensor, replace_node, set_tensor, unused_name
from fxprune.quantization.patterns import pattern_of

aten = torch.ops.aten
DECOMPOSED = (aten.silu, aten.hardsigmoid, aten.hardswish)


def element_wise(program: Program) -> list[fx.Node]:
    """Return the activations, and the products element by element, that can run in INT8."""
    found = []
    for node in program.graph.nodes:
        pattern = pattern_of(node)
        source = node.args[0] if packet_of(node) in DECOMPOSED else None
        computed = isinstance(source, fx.Node) and source.op == "call_function"
        if computed or (pattern is not None and pattern.onnx in ("Sigmoid", "Mul")):
            found.append(node)
    return found


def decompose(program: Program, chosen: Collection[fx.Node]) -> set[fx.Node]:
    """Replace the chosen activations by operators with INT8 kernels; return those that run so."""
    found: set[fx.Node] = set()
    for node in [node for node in program.graph.nodes if node in chosen]:
        found |= _decomposed(program, node) if packet_of(node) in DECOMPOSED else {node}
    program.refresh()
    return found


def _decomposed(program: Program, node: fx.Node) -> set[fx.Node]:
    x, kind = node.args[0], packet_of(node)
    if kind is aten.silu:
        gate = last = insert_call(program, node, aten.sigmoid.default, (x,))
    else:
        name = unused_name(program, f"{node.name}_offset")
        set_tensor(program, name, torch.tensor([3.0], device=node.meta["val"].device))
        three = read_tensor(program, name, node)
        gate = insert_call(program, node, aten.add.Tensor, (x, three))
        clamped = insert_call(program, node, aten.hardtanh.default, (gate, 0.0, 6.0))
        last = insert_call(program, node, aten.div.Tensor, (clamped, 6.0))
    if kind is aten.hardsigmoid:
        replace_node(program, node, last)
        return {gate}
    product = insert_call(program, node, aten.mul.Tensor, (x, last))
    replace_node(program, node, product)
    return {gate, product}
