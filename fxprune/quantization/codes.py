"""Fake-quantisers to codes: weights and biases stored as integers, activations quantised."""

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
BIAS_LIMIT = 2**30  # a bias fills at most half of 32 bits, so that sums have room


def convert(program: Program) -> int:
    """Replace every fake-quantiser; returns how many."""
    fakes = [node for node in program.graph.nodes if node.target is FAKE_QUANTIZE]
    for layer in list(program.graph.nodes):
        pattern = pattern_of(layer)
        if pattern is not None and pattern.weight is not None:
            _make_room(program, layer)
    for fake in fakes:
        if _weight_of(fake) is not None:
            _store_weight(program, fake)
        else:
            _split(program, fake)
    _sink(program)
    _absorb_factors(program)
    for node in list(program.graph.nodes):
        pattern = pattern_of(node)
        if pattern is not None and pattern.weight is not None and _sums_codes(node):
            _store_bias(program, node)
    return len(fakes)


def _make_room(program: Program, layer: fx.Node) -> None:
    """Widen the steps of weights that are nothing beside their bias, until that fits its code."""
    x, weight, bias = origin(cast(fx.Node, layer.args[0])), layer.args[1], argument(layer, "bias")
    if x.target is not FAKE_QUANTIZE or not isinstance(bias, fx.Node) or bias.op != "get_attr":
        return
    if isinstance(weight, fx.Node) and weight.target is FAKE_QUANTIZE:
        scale = cast(fx.Node, weight.args[1])
        least = _tensor(program, bias).abs() / (_tensor(program, x.args[1]) * BIAS_LIMIT)
        set_tensor(program, str(scale.target), torch.maximum(_tensor(program, scale), least))


def _sums_codes(layer: fx.Node) -> bool:
    """Whether a layer will add its bias to sums of codes; products of stacks of rows do not."""
    if packet_of(layer) is aten.linear and len(shape_of(layer)) != 2:
        return False
    return all(isinstance(x, fx.Node) and x.target is DEQUANTIZE for x in layer.args[:2])


def _weight_of(fake: fx.Node) -> str | None:
    """The name of the stored weight that a fake-quantiser rounds."""
    source, axis = fake.args[0], fake.args[5]
    stored = isinstance(source, fx.Node) and source.op == "get_attr" and axis != -1
    return str(source.target) if stored else None  # type: ignore[union-attr]


def _tensor(program: Program, node: Any) -> Tensor:
    return program.tensor(str(node.target)).detach()


def _store_weight(program: Program, fake: fx.Node) -> None:
    name = _weight_of(fake)
    assert name is not None
    arguments: tuple[Any, ...] = fake.args
    source, scale, zero, low, high, axis = arguments
    weight = program.tensor(name).detach()
    codes = quantize(weight, _tensor(program, scale), _tensor(program, zero), axis)
    set_tensor(program, name, codes.clamp(low, high))
    new = insert_call(program, fake, DEQUANTIZE, (source, scale, zero, axis))
    replace_node(program, fake, new)


def _split(program: Program, fake: fx.Node) -> None:
    value, scale, zero, *_, axis = fake.args
    codes = insert_call(program, fake, QUANTIZE, (value, scale, zero, axis))
    new = insert_call(program, fake, DEQUANTIZE, (codes, scale, zero, axis))
    replace_node(program, fake, new)


def _absorb_factors(program: Program) -> None:
    """Let scales of results take over what these are multiplied by."""
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
    """Store a bias in the units of the layer's sums, which add up without being rescaled."""
    node = argument(layer, "bias")
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return
    x, weight = cast(tuple[fx.Node, fx.Node], layer.args[:2])
    sums = _tensor(program, x.args[1]) * _tensor(program, weight.args[1])
    name = str(node.target)
    bias = program.tensor(name).detach()
    codes = torch.round(bias.double() / sums.double()).clamp(-BIAS_LIMIT, BIAS_LIMIT)
    if len(program.readers(name)) > 1:
        name = unused_name(program, f"{name}_codes")
    set_tensor(program, name, codes.to(torch.int32))
    stem = unused_name(program, f"{name}_scale")
    zero = unused_name(program, f"{name}_zero_point")
    set_tensor(program, stem, sums)
    set_tensor(program, zero, torch.zeros_like(sums, dtype=torch.int32))
    read = [read_tensor(program, each, layer) for each in (name, stem, zero)]
    new = insert_call(program, layer, DEQUANTIZE, (*read, 0))
    layer.replace_input_with(node, new)


def _sink(program: Program) -> None:
    """Let codes go through views, pads and the like, and dequantise behind them."""
    for node in list(program.graph.nodes):
        if not is_move(node):
            continue
        before = [item for item in node.all_input_nodes if not _is_size(item)]
        if any(item.target is not DEQUANTIZE for item in before):
            continue
        names = {tuple(str(getattr(x, "target", x)) for x in item.args[1:]) for item in before}
        if len(names) > 1 or before[0].args[3] != -1:
            continue
        _, scale, zero, axis = before[0].args
        for item in before:
            node.replace_input_with(item, cast(fx.Node, item.args[0]))
        if packet_of(node) in (aten.pad, aten.constant_pad_nd):
            _pad_with(node, int(_tensor(program, zero)))
        if packet_of(node) is aten.max_pool2d:
            _lay_out_by_rows(program, node)
        new = insert_call(program, node.next, DEQUANTIZE, (node, scale, zero, axis))
        for user in list(node.users):
            if user is not new:
                user.replace_input_with(node, new)


def _lay_out_by_rows(program: Program, pool: fx.Node) -> None:
    """Make a pool's input contiguous: PyTorch pools 8-bit integers in no other memory format."""
    codes = cast(fx.Node, pool.args[0])
    pool.replace_input_with(codes, insert_call(program, pool, aten.contiguous.default, (codes,)))


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (int, torch.SymInt))


def _pad_with(node: fx.Node, code: int) -> None:
    value = ("constant", float(code)) if packet_of(node) is aten.pad else (code,)
    node.args, node.kwargs = (*node.args[:2], *value), {}
