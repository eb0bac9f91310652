"""Transposed convolutions as convolutions, which have INT8 kernels.

With stride ``s``, every input position contributes to ``s`` neighbouring outputs per dimension and
tap. So a convolution with ``s * s`` times as many channels, one for each place in a square of ``s``
by ``s`` outputs, computes the same before its channels are moved to these places:

    conv_transpose2d(x, w, stride=s) = pixel_shuffle(conv2d(x, w'), s), cropped by the padding
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from fxprune.graph.node_args import arguments, packet_of, spread
from fxprune.graph.program import Program, shape_of
from fxprune.graph.surgery import (
    drop_unused,
    insert_call,
    read_tensor,
    replace_node,
    set_tensor,
    unused_name,
)

aten = torch.ops.aten


def spell_transposed(program: Program) -> int:
    """Write transposed convolutions of images as convolutions; returns how many."""
    found = [node for node in program.graph.nodes if _is_spelled(node)]
    for node in found:
        _spell(program, node)
    if found:
        drop_unused(program)
        program.refresh()
    return len(found)


def _is_spelled(node: fx.Node) -> bool:
    if packet_of(node) is not aten.conv_transpose2d:
        return False
    given = arguments(node)
    stored = isinstance(given["weight"], fx.Node) and given["weight"].op == "get_attr"
    step = set(spread(given["stride"], 2))
    plain = given["groups"] == 1 and set(spread(given["dilation"], 2)) == {1}
    if not stored or not plain or len(step) != 1 or step == {1} or len(shape_of(node)) != 4:
        return False
    return all(end <= full for _, end, full in _crops(node))


def _crops(node: fx.Node) -> list[tuple[int, int, int]]:
    """Where the output begins and ends along each dimension of all that is computed, and its size.

    Output padding may lie beyond that size, where nothing but the bias would be.
    """
    given = arguments(node)
    stride, source = spread(given["stride"], 2)[0], shape_of(given["input"])
    found = []
    for place, start in enumerate(spread(given["padding"], 2)):
        taps = math.ceil(shape_of(given["weight"])[place + 2] / stride)
        size = (source[place + 2] + taps - 1) * stride
        found.append((start, start + shape_of(node)[place + 2], size))
    return found


def _spell(program: Program, node: fx.Node) -> None:
    given = arguments(node)
    stride = spread(given["stride"], 2)[0]
    name = str(given["weight"].target)
    weight = as_convolution(program.tensor(name).detach(), stride)
    wide = unused_name(program, f"{name.removesuffix('.weight')}_phases.weight")
    set_tensor(program, wide, weight.requires_grad_(program.tensor(name).requires_grad))
    args: list[Any] = [given["input"], read_tensor(program, wide, node)]
    if isinstance(bias := given["bias"], fx.Node):
        stem = unused_name(program, wide.removesuffix("weight") + "bias")
        value = program.tensor(str(bias.target)).detach().repeat_interleave(stride**2)
        set_tensor(program, stem, value.requires_grad_(weight.requires_grad))
        args.append(read_tensor(program, stem, node))
    else:
        args.append(None)
    taps = [size - 1 for size in weight.shape[2:]]
    conv = insert_call(program, node, aten.conv2d.default, (*args, [1, 1], taps))
    last = insert_call(program, node, aten.pixel_shuffle.default, (conv, stride))
    for dim, (start, end, full) in enumerate(_crops(node), start=2):
        if (start, end) != (0, full):
            last = insert_call(program, node, aten.slice.Tensor, (last, dim, start, end))
    replace_node(program, node, last)


def as_convolution(weight: Tensor, stride: int) -> Tensor:
    """Return the convolution's weight: (in, out, h, w) -> (out * stride * stride, in, t, t).

    Its taps are as many as strides fit into the kernel, rounded up; channels are in the order in
    which ``pixel_shuffle`` takes them.
    """
    inputs, outputs, *kernel = weight.shape
    taps = [math.ceil(size / stride) for size in kernel]
    rest = [tap * stride - size for tap, size in zip(taps, kernel, strict=True)]
    whole = F.pad(weight, (0, rest[1], 0, rest[0]))
    phases = whole.view(inputs, outputs, taps[0], stride, taps[1], stride).flip(2, 4)
    return phases.permute(1, 3, 5, 0, 2, 4).reshape(-1, inputs, *taps).contiguous()
