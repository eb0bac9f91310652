"""Operators that only move data: they are executed as they are, on identities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxprune.graph.node_args import argument, arguments
from fxprune.graph.operators import packets
from fxprune.graph.surgery import rewrite_call
from fxprune.structure.flow import Flow
from fxprune.structure.labels import DimLabels, Labels, spread
from fxprune.structure.reads import NotCovered
from fxprune.structure.rules.record import OperatorRule, Remaining, Repair

aten = torch.ops.aten


def reshape(flow: Flow, node: fx.Node) -> Any:
    """A view, block by block: dimensions that are not regrouped with a label's own do not matter.

    So the work is that of the labels, not that of the activations.
    """
    source, shape = flow.labels(node.args[0]), tuple(node.meta["val"].shape)
    if node.target is aten.view.dtype and shape != source.shape:
        raise NotCovered("it reads numbers as numbers of another size")
    if 0 in shape:
        return Labels(shape)
    entries: tuple[DimLabels, ...] = ()
    for entry in source.entries:
        before, after = _block_of(source.shape, shape, entry.dim)
        inner = tuple(source.shape[before.start : before.stop])
        ids = spread(DimLabels(entry.dim - before.start, entry.ids), inner)
        ids = ids.reshape(shape[after.start : after.stop])
        view = (1,) * after.start + tuple(ids.shape) + (1,) * (len(shape) - after.stop)
        entries += flow.settle(node, entry.dim, ids.reshape(view))
    return Labels(shape, flow.sole(node, entries))


def reshape_like(flow: Flow, node: fx.Node) -> Any:
    """A view whose sizes are those of another value, and shrink with them."""
    moved, other = reshape(flow, node), flow.labels(node.args[1])
    entries: tuple[DimLabels, ...] = ()
    for dim in range(len(other.shape)):
        entries += flow.align(node, [(moved, dim), (other, dim)], dim)
    return Labels(other.shape, entries)


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
    """Execute a one-operand movement on the identities of each entry of its operand."""
    source = flow.labels(node.args[0])
    if any(isinstance(other.meta.get("val"), Tensor) for other in node.all_input_nodes[1:]):
        raise NotCovered("where elements go is computed")
    target: Any = node.target
    rest = flow.concrete(node.args[1:])
    keywords = {name: flow.concrete(value) for name, value in node.kwargs.items()}
    return replay(flow, node, source, lambda ids: target(ids, *rest, **keywords))


def replay(flow: Flow, node: fx.Node, source: Labels, movement: Any) -> Any:
    """Label a node's outputs by what ``movement`` does to each entry of ``source``."""
    value = node.meta["val"]
    shapes = _shapes(value)
    if source.entries and any(0 in shape for shape in shapes):
        raise NotCovered("one of its results has no elements")
    collected: list[list[DimLabels]] = [[] for _ in shapes]
    for entry in source.entries:
        moved = movement(spread(entry, source.shape))
        pieces = moved if isinstance(moved, (list, tuple)) else [moved]
        for number, piece in enumerate(pieces):
            key = entry.dim + len(source.shape) * number
            collected[number].extend(flow.settle(node, key, piece))
    labelled = [
        Labels(shape, flow.sole(node, tuple(entries)))
        for shape, entries in zip(shapes, collected, strict=True)
    ]
    return labelled if isinstance(value, (list, tuple)) else labelled[0]


def _shapes(value: Any) -> list[tuple[int, ...]]:
    if isinstance(value, Tensor):
        return [tuple(value.shape)]
    return [tuple(piece.shape) for piece in value]


def expand(flow: Flow, node: fx.Node) -> Any:
    """A dimension of size one that is expanded may shrink again with the size that it is given."""
    source, shape = flow.labels(node.args[0]), tuple(node.meta["val"].shape)
    moved = replay(flow, node, source, lambda ids: ids.expand(shape))
    sizes: list[Any] = list(node.args[1])  # type: ignore[arg-type]
    return Labels(shape, moved.entries + _grown(flow, node, source, sizes))


def expand_like(flow: Flow, node: fx.Node) -> Any:
    """A dimension of size one that is expanded takes the labels of the one it is expanded to."""
    source, other = flow.labels(node.args[0]), flow.labels(node.args[1])
    offset = len(other.shape) - len(source.shape)
    entries: tuple[DimLabels, ...] = ()
    for dim in range(len(other.shape)):
        met = [(other, dim)] if dim < offset else [(source, dim - offset), (other, dim)]
        entries += flow.align(node, met, dim)
    return Labels(other.shape, entries)


def repeat(flow: Flow, node: fx.Node) -> Any:
    """Repeating a dimension of size one is expanding it; otherwise labels repeat."""
    source, shape = flow.labels(node.args[0]), tuple(node.meta["val"].shape)
    times = flow.concrete(node.args[1])
    moved = replay(flow, node, source, lambda ids: ids.repeat(times))
    given: list[Any] = list(node.args[1])  # type: ignore[arg-type]
    return Labels(shape, moved.entries + _grown(flow, node, source, given))


def diagonal(flow: Flow, node: fx.Node) -> Any:
    """The main diagonal of a square keeps the same rows as columns; of any other both stay."""
    given, source = arguments(node), flow.labels(node.args[0])
    first, second = (given[name] % len(source.shape) for name in ("dim1", "dim2"))
    shape = tuple(node.meta["val"].shape)
    along: tuple[DimLabels, ...] = ()
    if given["offset"] == 0 and source.shape[first] == source.shape[second]:
        along = flow.align(node, [(source, first), (source, second)], len(shape) - 1)
    else:
        met = [*source.at(first), *source.at(second)]
        flow.freeze(node, met, "its diagonal is not the main one of a square")
    rest = Labels(source.shape, source.without(first, second))
    moved = replay(flow, node, rest, lambda ids: ids.diagonal(given["offset"], first, second))
    return Labels(shape, moved.entries + along)


def _grown(flow: Flow, node: fx.Node, source: Labels, sizes: list[Any]) -> tuple[DimLabels, ...]:
    """Label the dimensions that had no size before, or a size of one."""
    shape = tuple(node.meta["val"].shape)
    offset = len(shape) - len(source.shape)
    grown: tuple[DimLabels, ...] = ()
    for dim, size in enumerate(shape):
        if size > 1 and (dim < offset or source.shape[dim - offset] == 1):
            grown += flow.sized(node, dim, sizes[dim], size)
    return grown


def _sizes(position: int, *, inferred: bool = True) -> Repair:
    """Repair a list of the output's sizes; a computed one is inferred if the operator permits."""

    def repair(node: fx.Node, remaining: Remaining) -> None:
        if not isinstance(node.args[position], Sequence):
            return  # a view as another type
        sizes: list[Any] = list(node.args[position])  # type: ignore[arg-type]
        offset = len(remaining.before[0]) - len(sizes)
        for number, size in enumerate(sizes):
            dim = number + offset
            if dim not in remaining.kept[0]:
                continue
            if isinstance(size, fx.Node) and inferred:  # a symbolic product, such as batch * heads
                if -1 in sizes:  # only one size can be inferred, and the batch is in this one
                    other = sizes.index(-1)
                    sizes[other] = remaining.size(other + offset)
                sizes[number] = -1
            elif size != -1:
                sizes[number] = remaining.resized(node, size, dim)
        node.update_arg(position, sizes)

    return repair


def _split_evenly(node: fx.Node, remaining: Remaining) -> None:
    """Pieces of one size become pieces whose sizes are given."""
    source, dim = node.args[0], argument(node, "dim") % len(remaining.before[0])
    if any(dim in kept for kept in remaining.kept):
        sizes = [remaining.size(dim, piece) for piece in range(len(remaining.before))]
        rewrite_call(remaining.program, node, aten.split_with_sizes.default, (source, sizes, dim))


def _repeated(node: fx.Node, remaining: Remaining) -> None:
    """The size of the result, where it is given, is what it will be."""
    node.kwargs = {name: value for name, value in node.kwargs.items() if name != "output_size"}


def _unflatten(node: fx.Node, remaining: Remaining) -> None:
    sizes: list[Any] = list(node.args[2])  # type: ignore[arg-type]
    first = int(node.args[1]) % node.args[0].meta["val"].dim()  # type: ignore[union-attr, arg-type]
    for number, size in enumerate(sizes):
        if first + number in remaining.kept[0] and isinstance(size, int) and size != -1:
            sizes[number] = remaining.size(first + number)
    node.update_arg(2, sizes)


def _split(node: fx.Node, remaining: Remaining) -> None:
    dim = argument(node, "dim") % len(remaining.before[0])
    sizes = [remaining.size(dim, piece) for piece in range(len(remaining.before))]
    if any(dim in kept for kept in remaining.kept):
        node.update_arg(1, sizes)


def _repeat(node: fx.Node, remaining: Remaining) -> None:
    """Only dimensions of size one that were repeated carry a literal."""
    times: list[Any] = list(node.args[1])  # type: ignore[arg-type]
    shape = node.args[0].meta["val"].shape  # type: ignore[union-attr]
    offset = len(times) - len(shape)
    for dim in remaining.kept[0]:
        if dim < offset or shape[dim - offset] == 1:
            times[dim] = remaining.resized(node, times[dim], dim)
    node.update_arg(1, times)


def _narrow(node: fx.Node, remaining: Remaining) -> None:
    rank = len(remaining.before[0])
    dim = int(node.args[1]) % rank  # type: ignore[arg-type]
    mask = remaining.operand(node.args[0]).get(dim)
    if mask is not None:
        node.update_arg(2, int(mask[: int(node.args[2])].sum()))  # type: ignore[arg-type]
        node.update_arg(3, remaining.size(dim))


RESHAPE = OperatorRule(reshape, _sizes(1))
MOVE = OperatorRule(move)
EXPAND = OperatorRule(expand, _sizes(1, inferred=False))
MOVEMENTS = (
    "permute transpose t numpy_T mT adjoint movedim moveaxis swapaxes swapdims squeeze unsqueeze"
    " flip tile pixel_shuffle pixel_unshuffle"
    " rot90 atleast_2d atleast_3d"
)

RULES: dict[Any, OperatorRule] = {
    **dict.fromkeys(packets(MOVEMENTS), MOVE),
    **dict.fromkeys((aten.view, aten.reshape, aten._unsafe_view), RESHAPE),
    **dict.fromkeys((aten.view_as, aten.reshape_as), OperatorRule(reshape_like)),
    **dict.fromkeys((aten.flatten, aten.ravel), OperatorRule(reshape)),
    aten.unflatten: OperatorRule(reshape, _unflatten),
    aten.split_with_sizes: OperatorRule(move, _split),
    **dict.fromkeys((aten.split, aten.chunk, aten.tensor_split), OperatorRule(move, _split_evenly)),
    aten.repeat_interleave: OperatorRule(move, _repeated),
    aten.narrow: OperatorRule(move, _narrow),
    **dict.fromkeys(
        (aten.expand, aten.broadcast_to), OperatorRule(expand, _sizes(1, inferred=False))
    ),
    aten.expand_as: OperatorRule(expand_like),
    aten.repeat: OperatorRule(repeat, _repeat),
    aten.diagonal: OperatorRule(diagonal),
}
