"""Conversion of fake-quantisers: integer weights and biases, quantised activations."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, fx

from fxprune.graph.custom_ops import DEQUANTIZE, FAKE_QUANTIZE, QUANTIZE, quantize
from fxprune.graph.node_args import argument, packet_of
from fxprune.graph.program import Program, shape_of
from fxprune.graph.surgery import insert_call, read_tensor, replace_node, set_tensor, unused_name
from fxprune.quantization.patterns import factor_of, is_move, origin, pattern_of

aten = torch.ops.aten
BIAS_LIMIT = 2**30  # half of the range of INT32, so that sums do not overflow


def convert(program: Program) -> int:
    """Replace every fake-quantiser; return their number."""
    fakes = [node for node in program.graph.nodes if node.target is FAKE_QUANTIZE]
    for layer in list(program.graph.nodes):
        pattern = pattern_of(layer)
        if pattern is not None and pattern.weight is not None:
            _make_room(program, layer)
    for fake in fakes:
        if _is_weight(fake):
            _store_weight(program, fake)
        else:
            value, scale, zero, *_, axis = fake.args
            quantized = insert_call(program, fake, QUANTIZE, (value, scale, zero, axis))
            new = insert_call(program, fake, DEQUANTIZE, (quantized, scale, zero, axis))
            replace_node(program, fake, new)
    _sink(program)
    _absorb_factors(program)
    for node in list(program.graph.nodes):
        pattern = pattern_of(node)
        if pattern is None or pattern.weight is None:
            continue
        # Linear layers on inputs of other than two dimensions add their bias in FP32.
        stacked = packet_of(node) is aten.linear and len(shape_of(node)) != 2
        operands = node.args[:2]
        int8 = all(isinstance(x, fx.Node) and x.target is DEQUANTIZE for x in operands)
        if int8 and not stacked:
            _store_bias(program, node)
    return len(fakes)


def _make_room(program: Program, layer: fx.Node) -> None:
    """Increase the scale of weights that are tiny beside their bias until the bias fits INT32."""
    x, weight, bias = origin(cast(fx.Node, layer.args[0])), layer.args[1], argument(layer, "bias")
    if x.target is not FAKE_QUANTIZE or not isinstance(bias, fx.Node) or bias.op != "get_attr":
        return
    if isinstance(weight, fx.Node) and weight.target is FAKE_QUANTIZE:
        scale = cast(fx.Node, weight.args[1])
        least = _tensor(program, bias).abs() / (_tensor(program, x.args[1]) * BIAS_LIMIT)
        set_tensor(program, str(scale.target), torch.maximum(_tensor(program, scale), least))


def _is_weight(fake: fx.Node) -> bool:
    """Whether a fake-quantiser rounds a stored weight."""
    source, axis = fake.args[0], fake.args[5]
    return isinstance(source, fx.Node) and source.op == "get_attr" and bool(axis != -1)


def _tensor(program: Program, node: Any) -> Tensor:
    return program.tensor(str(node.target)).detach()


def _store_weight(program: Program, fake: fx.Node) -> None:
    arguments: tuple[Any, ...] = fake.args
    source, scale, zero, low, high, axis = arguments
    weight = _tensor(program, source)
    integers = quantize(weight, _tensor(program, scale), _tensor(program, zero), axis)
    set_tensor(program, str(source.target), integers.clamp(low, high))
    new = insert_call(program, fake, DEQUANTIZE, (source, scale, zero, axis))
    replace_node(program, fake, new)


def _absorb_factors(program: Program) -> None:
    """Merge the constant factor of a result into its scale."""
    for node in list(program.graph.nodes):
        if node.target is not QUANTIZE or node.args[3] != -1:
            continue
        value, scale, *rest = cast(tuple[Any, ...], node.args)
        factor = factor_of(value)
        if factor is None or len(value.users) > 1:
            continue
        name = unused_name(program, f"{scale.target}_undivided")
        set_tensor(program, name, _tensor(program, scale) / factor)
        node.args = (value.args[0], read_tensor(program, name, node), *rest)


def _store_bias(program: Program, layer: fx.Node) -> None:
    """Store a bias as INT32 with the scale of the layer's sums."""
    node = argument(layer, "bias")
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return
    x, weight = cast(tuple[fx.Node, fx.Node], layer.args[:2])
    sums = _tensor(program, x.args[1]) * _tensor(program, weight.args[1])
    name = str(node.target)
    bias = program.tensor(name).detach()
    integers = torch.round(bias.double() / sums.double()).clamp(-BIAS_LIMIT, BIAS_LIMIT)
    if len(program.readers(name)) > 1:
        name = unused_name(program, f"{name}_codes")
    set_tensor(program, name, integers.to(torch.int32))
    stem = unused_name(program, f"{name}_scale")
    zero = unused_name(program, f"{name}_zero_point")
    set_tensor(program, stem, sums)
    set_tensor(program, zero, torch.zeros_like(sums, dtype=torch.int32))
    read = [read_tensor(program, each, layer) for each in (name, stem, zero)]
    new = insert_call(program, layer, DEQUANTIZE, (*read, 0))
    layer.replace_input_with(node, new)


def _sink(program: Program) -> None:
    """Move dequantisation behind operators that only move data, so that these run on INT8."""
    for node in list(program.graph.nodes):
        if not is_move(node):
            continue
        before = [
            item
            for item in node.all_input_nodes
            if not isinstance(item.meta.get("val"), (int, torch.SymInt))
        ]
        if any(item.target is not DEQUANTIZE for item in before):
            continue
        names = {tuple(str(getattr(x, "target", x)) for x in item.args[1:]) for item in before}
        if len(names) > 1 or before[0].args[3] != -1:
            continue
        _, scale, zero, axis = before[0].args
        for item in before:
            node.replace_input_with(item, cast(fx.Node, item.args[0]))
        if packet_of(node) in (aten.pad, aten.constant_pad_nd):
            zero_point = int(_tensor(program, zero))
            padding = (
                ("constant", float(zero_point)) if packet_of(node) is aten.pad else (zero_point,)
            )
            node.args, node.kwargs = (*node.args[:2], *padding), {}
        if packet_of(node) is aten.max_pool2d:  # PyTorch pools contiguous 8-bit integers only
            source = cast(fx.Node, node.args[0])
            rows = insert_call(program, node, aten.contiguous.default, (source,))
            node.replace_input_with(source, rows)
        new = insert_call(program, node.next, DEQUANTIZE, (node, scale, zero, axis))
        for user in list(node.users):
            if user is not new:
                user.replace_input_with(node, new)
