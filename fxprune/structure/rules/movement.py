"""Operators that only move data: they are executed as they are, on identities."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from fxprune.graph.node_args import arguments
from fxprune.structure.flow import Flow, Rule
from fxprune.structure.labels import Labels, Layer, spread

aten = torch.ops.aten


def reshape(flow: Flow, node: fx.Node) -> Any:
    """A view, block by block: dimensions that are not regrouped with a label's own do not matter.

    So the work is that of the labels, not that of the activations.
    """
    source, shape = flow.labels(node.args[0]), tuple(node.meta["val"].shape)
    layers: tuple[Layer, ...] = ()
    for layer in source.layers:
        before, after = _block_of(source.shape, shape, layer.dim)
        inner = tuple(source.shape[before.start : before.stop])
        ids = spread(Layer(layer.dim - before.start, layer.ids), inner)
        ids = ids.reshape(shape[after.start : after.stop])
        view = (1,) * after.start + tuple(ids.shape) + (1,) * (len(shape) - after.stop)
        layers += flow.settle(node, layer.dim, ids.reshape(view))
    return Labels(shape, flow.sole(node, layers))


def _block_of(before: tuple[int, ...], after: tuple[int, ...], dim: int) -> tuple[range, range]:
    """Return the smallest runs of dimensions, of equal size, of which the first holds ``dim``."""
    left = right = 0
    while True:
        start = left, right
        size, other = before[left], after[right]
        left, right = left + 1, right + 1
        while size != other:
            if size < other:
                size, left = size * before[left], left + 1
            else:
                other, right = other * after[right], right + 1
        if dim < left:
            return range(start[0], left), range(start[1], right)


def move(flow: Flow, node: fx.Node) -> Any:
    """Execute a one-operand movement on the identities of each layer of its operand."""
    source = flow.labels(node.args[0])
    target: Any = node.target
    rest = flow.concrete(node.args[1:])
    keywords = {name: flow.concrete(value) for name, value in node.kwargs.items()}
    return replay(flow, node, source, lambda ids: target(ids, *rest, **keywords))


def replay(flow: Flow, node: fx.Node, source: Labels, movement: Any) -> Any:
    """Label a node's outputs by what ``movement`` does to each layer of ``source``."""
    value = node.meta["val"]
    shapes = _shapes(value)
    collected: list[list[Layer]] = [[] for _ in shapes]
    for layer in source.layers:
        moved = movement(spread(layer, source.shape))
        pieces = moved if isinstance(moved, (list, tuple)) else [moved]
        for number, piece in enumerate(pieces):
            key = layer.dim + len(source.shape) * number
            collected[number].extend(flow.settle(node, key, piece))
    labelled = [
        Labels(shape, flow.sole(node, tuple(layers)))
        for shape, layers in zip(shapes, collected, strict=True)
    ]
    return labelled if isinstance(value, (list, tuple)) else labelled[0]


def _shapes(value: Any) -> list[tuple[int, ...]]:
    if isinstance(value, Tensor):
        return [tuple(value.shape)]
    return [tuple(piece.shape) for piece in value]


def expand(flow: Flow, node: fx.Node) -> Any:
    """A dimension of size one that is expanded may shrink again: its size is a literal."""
    source, shape = flow.labels(node.args[0]), tuple(node.meta["val"].shape)
    moved = replay(flow, node, source, lambda ids: ids.expand(shape))
    offset = len(shape) - len(source.shape)
    grown = tuple(
        Layer(dim, flow.literal(node, dim, size))
        for dim, size in enumerate(shape)
        if size > 1 and (dim < offset or source.shape[dim - offset] == 1)
    )
    return Labels(shape, moved.layers + grown)


def repeat(flow: Flow, node: fx.Node) -> Any:
    """Repeating a dimension of size one is expanding it; otherwise labels repeat."""
    source, shape = flow.labels(node.args[0]), tuple(node.meta["val"].shape)
    times = flow.concrete(node.args[1])
    moved = replay(flow, node, source, lambda ids: ids.repeat(times))
    offset = len(shape) - len(source.shape)
    grown = tuple(
        Layer(dim, flow.literal(node, dim, size))
        for dim, size in enumerate(shape)
        if size > 1 and (dim < offset or source.shape[dim - offset] == 1)
    )
    return Labels(shape, moved.layers + grown)


def concatenate(flow: Flow, node: fx.Node) -> Any:
    """Labels join along the dimension and must agree along the others."""
    given = arguments(node)
    sources = [flow.labels(item) for item in given["tensors"]]
    shape = tuple(node.meta["val"].shape)
    dim = (given["dim"] or 0) % len(shape)
    sources = [source for source in sources if len(source.shape) == len(shape)]
    ids = [_joined(flow, node, source, dim) for source in sources]
    layers: tuple[Layer, ...] = ()
    if any(part is not None for part in ids):
        none = [torch.zeros(source.shape[dim], dtype=torch.int32) for source in sources]
        parts = [n if part is None else part for n, part in zip(none, ids, strict=True)]
        layers = (Layer(dim, torch.cat(parts)),)
    for other in range(len(shape)):
        if other != dim:
            layers += flow.align(node, [(source, other) for source in sources], other)
    return Labels(shape, layers)


def _joined(flow: Flow, node: fx.Node, source: Labels, dim: int) -> Tensor | None:
    layers = list(source.at(dim))
    flow.freeze(node, layers[1:], "two labels meet in a concatenation")
    return layers[0].ids if layers else None


def stack(flow: Flow, node: fx.Node) -> Any:
    """Labels must agree along every dimension that was there before."""
    given = arguments(node)
    sources = [flow.labels(item) for item in given["tensors"]]
    shape = tuple(node.meta["val"].shape)
    new = (given["dim"] or 0) % len(shape)
    layers: tuple[Layer, ...] = ()
    for dim in range(len(shape) - 1):
        out_dim = dim + (dim >= new)
        layers += flow.align(node, [(source, dim) for source in sources], out_dim)
    return Labels(shape, layers)


def pad(flow: Flow, node: fx.Node) -> Any:
    """Constant padding makes units of its own; their number is a literal of the node."""
    source, shape = flow.labels(node.args[0]), tuple(node.meta["val"].shape)
    amounts = [flow.concrete(amount) for amount in flow.concrete(node.args[1])]
    layers = []
    for layer in source.layers:
        position = 2 * (len(shape) - 1 - layer.dim)
        before, after = amounts[position : position + 2] if position < len(amounts) else (0, 0)
        ids = layer.ids[max(-before, 0) : layer.ids.numel() - max(-after, 0)]
        made = flow.literal(node, layer.dim, max(before, 0) + max(after, 0))
        sides = made[: max(before, 0)], made[max(before, 0) :]
        layers.append(Layer(layer.dim, torch.cat([sides[0], ids, sides[1]])))
    return Labels(shape, tuple(layers))


def pad_mirrored(flow: Flow, node: fx.Node) -> Any:
    """Reflection, replication and wrapping read other positions: the padded dimensions stay."""
    source = flow.labels(node.args[0])
    amounts = flow.concrete(node.args[1])
    padded = {-1 - position // 2 for position, amount in enumerate(amounts) if amount}
    for dim in padded:
        flow.freeze(node, source.at(dim), "its positions are repeated as padding")
    return Labels(tuple(node.meta["val"].shape), source.without(*padded))


def pad_any(flow: Flow, node: fx.Node) -> Any:
    """Padding whose mode is an argument."""
    mode = arguments(node)["mode"]
    if mode == "constant":
        return pad(flow, node)
    return pad_mirrored(flow, node)


RESHAPES = (
    "view",
    "reshape",
    "_unsafe_view",
    "view_as",
    "reshape_as",
    "flatten",
    "unflatten",
    "ravel",
)
MOVEMENTS = (
    "permute", "transpose", "t",
    "numpy_T", "mT", "adjoint", "movedim", "moveaxis", "swapaxes", "swapdims", "squeeze",
    "unsqueeze", "split_with_sizes", "split", "chunk",
    "tensor_split", "narrow", "flip", "repeat_interleave", "tile", "pixel_shuffle",
    "pixel_unshuffle", "diagonal", "rot90",
    "atleast_2d", "atleast_3d",
)  # fmt: skip

RULES: dict[Any, Rule] = {
    **{getattr(aten, name): move for name in MOVEMENTS if hasattr(aten, name)},
    **{getattr(aten, name): reshape for name in RESHAPES},
    aten.expand: expand,
    aten.expand_as: expand,
    aten.broadcast_to: expand,
    aten.repeat: repeat,
    aten.cat: concatenate,
    aten.concat: concatenate,
    aten.stack: stack,
    aten.constant_pad_nd: pad,
    aten.pad: pad_any,
    aten.reflection_pad1d: pad_mirrored,
    aten.reflection_pad2d: pad_mirrored,
    aten.reflection_pad3d: pad_mirrored,
    aten.replication_pad1d: pad_mirrored,
    aten.replication_pad2d: pad_mirrored,
    aten.replication_pad3d: pad_mirrored,
}
