"""Activations in the operators that ONNX Runtime has INT8 kernels for.

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
SPELLED = (aten.silu, aten.hardsigmoid, aten.hardswish)


def element_wise(program: Program) -> list[fx.Node]:
    """Return the activations, and the products element by element, that can run in INT8."""
    return [node for node in program.graph.nodes if _is_candidate(node)]


def _is_candidate(node: fx.Node) -> bool:
    if packet_of(node) in SPELLED:
        source = node.args[0]
        return isinstance(source, fx.Node) and source.op == "call_function"
    pattern = pattern_of(node)
    return pattern is not None and pattern.onnx in ("Sigmoid", "Mul")


def spell(program: Program, chosen: Collection[fx.Node]) -> set[fx.Node]:
    """Write the chosen activations in operators with INT8 kernels; return what runs in INT8."""
    found: set[fx.Node] = set()
    for node in [node for node in program.graph.nodes if node in chosen]:
        found |= _spelled(program, node) if packet_of(node) in SPELLED else {node}
    program.refresh()
    return found


def _spelled(program: Program, node: fx.Node) -> set[fx.Node]:
    x, kind = node.args[0], packet_of(node)
    if kind is aten.silu:
        gate = last = insert_call(program, node, aten.sigmoid.default, (x,))
    else:
        gate = insert_call(program, node, aten.add.Tensor, (x, _three(program, node)))
        clamped = insert_call(program, node, aten.hardtanh.default, (gate, 0.0, 6.0))
        last = insert_call(program, node, aten.div.Tensor, (clamped, 6.0))
    if kind is aten.hardsigmoid:
        replace_node(program, node, last)
        return {gate}
    product = insert_call(program, node, aten.mul.Tensor, (x, last))
    replace_node(program, node, product)
    return {gate, product}


def _three(program: Program, node: fx.Node) -> fx.Node:
    name = unused_name(program, f"{node.name}_offset")
    set_tensor(program, name, torch.tensor([3.0], device=node.meta["val"].device))
    return read_tensor(program, name, node)
