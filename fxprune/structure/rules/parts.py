"""Parts of a dimension: slices, what is written over them, rolls, sliding windows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from fxprune.graph.node_args import arguments
from fxprune.structure.flow import Flow
from fxprune.structure.labels import DimLabels, Labels
from fxprune.structure.rules.movement import move, replay
from fxprune.structure.rules.record import OperatorRule, Remaining

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
        flow.freeze(node, labels.at(dim), "a strided view covers a part of it")
        return False
    for entry in labels.at(dim):
        blocks = entry.ids.view(-1, step)
        flow.merge(node, blocks[:, :1].expand_as(blocks), blocks)
    return True


def slice_scatter(flow: Flow, node: fx.Node) -> Any:
    """What is written over a part keeps the indices of that part."""
    given = arguments(node)
    whole, part, step = flow.labels(given["self"]), flow.labels(given["src"]), given["step"]
    dim = given["dim"] % len(whole.shape)
    region = [slice(None)] * len(whole.shape)
    region[dim] = slice(given["start"], given["end"], step)
    entries: tuple[DimLabels, ...] = ()
    for other in range(len(whole.shape)):
        if other != dim:
            entries += flow.align(node, [(whole, other), (part, other)], other)
    if step != 1 and not _block(flow, node, whole, dim):
        flow.freeze(node, part.at(dim), "it is written into a part of a strided view")
        return Labels(whole.shape, entries)
    for entry in whole.at(dim):
        inside = Labels((part.shape[dim],), (DimLabels(0, entry.ids[region[dim]]),))
        flow.align(node, [(inside, 0), (part, dim)], 0)
        entries += (entry,)
    if not any(whole.at(dim)):
        flow.freeze(node, part.at(dim), "it is written into a dimension whose size is fixed")
    return Labels(whole.shape, entries)


def roll(flow: Flow, node: fx.Node) -> Any:
    """A roll along given dimensions moves labels; one of the flattened tensor fixes them all."""
    source, given = flow.labels(node.args[0]), arguments(node)
    if given["dims"]:
        return move(flow, node)
    flow.freeze(node, source.entries, "a roll runs over all dimensions")
    return Labels(source.shape)


def im2col(flow: Flow, node: fx.Node) -> Any:
    """Channels become channels times positions of the window; space becomes one dimension."""
    source, shape = flow.labels(node.args[0]), tuple(node.meta["val"].shape)
    channel = len(source.shape) - 3
    space = [entry for entry in source.entries if entry.dim > channel]
    flow.freeze(node, space, "a window slides along it")
    times = shape[channel] // source.shape[channel]
    entries = tuple(
        DimLabels(channel, entry.ids.repeat_interleave(times)) if entry.dim == channel else entry
        for entry in source.entries
        if entry.dim <= channel
    )
    return Labels(shape, entries)


def col2im(flow: Flow, node: fx.Node) -> Any:
    """The positions of a channel's window go together; windows are summed into space."""
    source, shape = flow.labels(node.args[0]), tuple(node.meta["val"].shape)
    channel = len(shape) - 3
    flow.freeze(node, source.at(channel + 1), "windows along it are summed")
    entries = tuple(entry for entry in source.entries if entry.dim < channel)
    for entry in source.at(channel):
        windows = entry.ids.view(shape[channel], -1)
        flow.merge(node, windows[:, :1].expand_as(windows), windows)
        entries += (DimLabels(channel, windows[:, 0]),)
    return Labels(shape, entries)


def unfold(flow: Flow, node: fx.Node) -> Any:
    """Windows of a dimension fix it; the others move."""
    source, given = flow.labels(node.args[0]), arguments(node)
    dim = given["dimension"] % len(source.shape)
    flow.freeze(node, source.at(dim), "a window slides along it")
    return Labels(tuple(node.meta["val"].shape), source.without(dim))


def _slice(node: fx.Node, remaining: Remaining) -> None:
    rank = len(remaining.before[0])
    dim = int(node.args[1] if len(node.args) > 1 else 0) % rank  # type: ignore[arg-type]
    mask = remaining.operand(node.args[0]).get(dim)
    if mask is not None:
        _shift_bounds(node, mask, (2, 3))


def _shift_bounds(node: fx.Node, mask: Tensor, positions: tuple[int, int]) -> None:
    """Count bounds anew; those of a strided slice lie in the first block and past the end."""
    length, stride = mask.numel(), positions[1] + 1
    if len(node.args) > stride and node.args[stride] != 1:
        return
    for position in positions:
        bound = node.args[position] if len(node.args) > position else None
        if isinstance(bound, int) and -length <= bound < length:
            node.update_arg(position, int(mask[: bound % length].sum()))


def _slice_scatter(node: fx.Node, remaining: Remaining) -> None:
    dim = int(node.args[2] if len(node.args) > 2 else 0) % len(remaining.before[0])  # type: ignore[arg-type]
    mask = remaining.kept[0].get(dim)
    if mask is not None:
        _shift_bounds(node, mask, (3, 4))


def _roll(node: fx.Node, remaining: Remaining) -> None:
    """What wraps around is counted anew."""
    shifts, rank = list(node.args[1]), len(remaining.before[0])  # type: ignore[arg-type]
    for number, dim in enumerate(node.args[2] if len(node.args) > 2 else ()):  # type: ignore[arg-type]
        mask = remaining.operand(node.args[0]).get(dim % rank)
        if mask is not None:
            wrapped = shifts[number] % mask.numel()
            shifts[number] = int(mask[mask.numel() - wrapped :].sum())
    node.update_arg(1, shifts)


RULES: dict[Any, OperatorRule] = {
    aten.slice: OperatorRule(slice_, _slice),
    aten.slice_scatter: OperatorRule(slice_scatter, _slice_scatter),
    aten.roll: OperatorRule(roll, _roll),
    aten.im2col: OperatorRule(im2col),
    aten.col2im: OperatorRule(col2im),
    aten.unfold: OperatorRule(unfold),
}
