"""Parts of a dimension: slices, what is written over them, rolls, sliding windows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from fxprune.graph.node_args import arguments
from fxprune.structure.flow import Flow, Rule
from fxprune.structure.labels import Labels, Layer
from fxprune.structure.rules.movement import move, replay

aten = torch.ops.aten


def slice_(flow: Flow, node: fx.Node) -> Any:
    """A strided slice keeps or loses whole blocks of its stride; then it is a movement."""
    given = arguments(node)
    source, dim = flow.labels(node.args[0]), given["dim"] % len(node.args[0].meta["val"].shape)  # type: ignore[union-attr]
    if given["step"] != 1:
        fits = _block(flow, node, source, dim)
        source = source if fits else Labels(source.shape, source.without(dim))
    return replay(flow, node, source, lambda ids: _sliced(flow, node, ids))


def _sliced(flow: Flow, node: fx.Node, ids: Tensor) -> Tensor:
    rest = flow.concrete(node.args[1:])
    keywords = {name: flow.concrete(value) for name, value in node.kwargs.items()}
    sliced: Tensor = aten.slice(ids, *rest, **keywords)
    return sliced


def _block(flow: Flow, node: fx.Node, labels: Labels, dim: int) -> bool:
    """Merge blocks of a stride that starts in the first of them; else freeze the dimension."""
    given = arguments(node)
    step, size = given["step"], labels.shape[dim]
    start, end = given["start"] or 0, given["end"]
    if size % step or not 0 <= start < step or (end is not None and end < size):
        flow.freeze(node, labels.at(dim), "a stride runs over a part of it")
        return False
    for layer in labels.at(dim):
        blocks = layer.ids.view(-1, step)
        flow.merge(node, blocks[:, :1].expand_as(blocks), blocks)
    return True


def slice_scatter(flow: Flow, node: fx.Node) -> Any:
    """What is written over a part keeps the indices of that part."""
    given = arguments(node)
    whole, part, step = flow.labels(given["self"]), flow.labels(given["src"]), given["step"]
    dim = given["dim"] % len(whole.shape)
    region = [slice(None)] * len(whole.shape)
    region[dim] = slice(given["start"], given["end"], step)
    layers: tuple[Layer, ...] = ()
    for other in range(len(whole.shape)):
        if other != dim:
            layers += flow.align(node, [(whole, other), (part, other)], other)
    if step != 1 and not _block(flow, node, whole, dim):
        flow.freeze(node, part.at(dim), "it is written over a part of a stride")
        return Labels(whole.shape, layers)
    for layer in whole.at(dim):
        inside = Labels((part.shape[dim],), (Layer(0, layer.ids[region[dim]]),))
        flow.align(node, [(inside, 0), (part, dim)], 0)
        layers += (layer,)
    if not any(whole.at(dim)):
        flow.freeze(node, part.at(dim), "it is written into a dimension whose size is fixed")
    return Labels(whole.shape, layers)


def roll(flow: Flow, node: fx.Node) -> Any:
    """A roll along given dimensions moves labels; one of the flattened tensor fixes them all."""
    source, given = flow.labels(node.args[0]), arguments(node)
    if given["dims"]:
        return move(flow, node)
    flow.freeze(node, source.layers, "a roll runs over all dimensions")
    return Labels(source.shape)


def im2col(flow: Flow, node: fx.Node) -> Any:
    """Channels become channels times positions of the window; space becomes one dimension."""
    source, shape = flow.labels(node.args[0]), tuple(node.meta["val"].shape)
    channel = len(source.shape) - 3
    space = [layer for layer in source.layers if layer.dim > channel]
    flow.freeze(node, space, "a window slides along it")
    times = shape[channel] // source.shape[channel]
    layers = tuple(
        Layer(channel, layer.ids.repeat_interleave(times)) if layer.dim == channel else layer
        for layer in source.layers
        if layer.dim <= channel
    )
    return Labels(shape, layers)


def col2im(flow: Flow, node: fx.Node) -> Any:
    """The positions of a channel's window go together; windows are summed into space."""
    source, shape = flow.labels(node.args[0]), tuple(node.meta["val"].shape)
    channel = len(shape) - 3
    flow.freeze(node, source.at(channel + 1), "windows along it are summed")
    layers = tuple(layer for layer in source.layers if layer.dim < channel)
    for layer in source.at(channel):
        windows = layer.ids.view(shape[channel], -1)
        flow.merge(node, windows[:, :1].expand_as(windows), windows)
        layers += (Layer(channel, windows[:, 0]),)
    return Labels(shape, layers)


def unfold(flow: Flow, node: fx.Node) -> Any:
    """Windows of a dimension fix it; the others move."""
    source, given = flow.labels(node.args[0]), arguments(node)
    dim = given["dimension"] % len(source.shape)
    flow.freeze(node, source.at(dim), "a window slides along it")
    return Labels(tuple(node.meta["val"].shape), source.without(dim))


RULES: dict[Any, Rule] = {
    aten.slice: slice_,
    aten.slice_scatter: slice_scatter,
    aten.roll: roll,
    aten.im2col: im2col,
    aten.col2im: col2im,
    aten.unfold: unfold,
}
