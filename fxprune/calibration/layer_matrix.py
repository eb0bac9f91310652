"""Layers with a stored weight, as linear maps: their calls, inputs and outputs as matrices."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from fxprune.graph.node_args import argument, packet_of, paddings, spread
from fxprune.graph.operators import operator_of
from fxprune.graph.program import Program

aten = torch.ops.aten
BLOCK_ELEMENTS = 2**23  # of a block of features


@dataclass(frozen=True)
class Layer:
    """A stored weight and the calls that read it, in graph order.

    Attributes:
        weight: the weight's name.
        bias: the bias's name; None if there is none, or calls differ in it.
        calls: convolutions or linear layers.

    """

    weight: str
    bias: str | None
    calls: tuple[fx.Node, ...]

    @property
    def node(self) -> fx.Node:
        """The first call."""
        return self.calls[0]

    @property
    def fits(self) -> bool:
        """Whether ``blocks`` supports the layer: all but transposed convolutions."""
        return operator_of(self.node).kind != "transposed-convolution"


def layers(program: Program) -> tuple[Layer, ...]:
    """Return the layers whose weights are stored and have no other readers, in graph order."""
    return tuple(_layers(program))


def _layers(program: Program) -> Iterator[Layer]:
    readers: dict[int, list[fx.Node]] = {}
    names: dict[int, str] = {}
    for node in program.tensor_nodes():
        tensor = program.tensor(str(node.target))
        names.setdefault(id(tensor), str(node.target))
        readers.setdefault(id(tensor), []).extend(node.users)
    order = {node: number for number, node in enumerate(program.graph.nodes)}
    found = []
    for key, users in readers.items():
        calls = sorted(set(users), key=order.__getitem__)
        if not all(operator_of(call).is_layer for call in calls):
            continue
        weights = [argument(call, "weight") for call in calls]
        tensors = [program.tensor(str(w.target)) for w in weights if w.op == "get_attr"]
        if len(tensors) == len(calls) and all(id(tensor) == key for tensor in tensors):
            found.append(Layer(names[key], _bias(program, calls, readers), tuple(calls)))
    yield from sorted(found, key=lambda layer: order[layer.node])


def _bias(program: Program, calls: list[fx.Node], readers: dict[int, list[fx.Node]]) -> str | None:
    """The bias that all calls add and no other node reads."""
    biases = [argument(call, "bias") for call in calls]
    if not all(isinstance(bias, fx.Node) and bias.op == "get_attr" for bias in biases):
        return None
    tensors = [program.tensor(str(bias.target)) for bias in biases]
    if len({id(tensor) for tensor in tensors}) > 1:
        return None
    return str(biases[0].target) if set(readers[id(tensors[0])]) == set(calls) else None


def channel_axis(node: fx.Node) -> int:
    """Return the dimension of the output channels in a call's value, counted from the last."""
    if packet_of(node) is aten.linear:
        return -1
    dims: int = argument(node, "weight").meta["val"].dim()
    return 1 - dims


def output_shape(node: fx.Node, value: Tensor) -> tuple[int, ...]:
    """Return the shape of a call's value for an input of any batch size."""
    traced = node.meta["val"].shape
    if packet_of(node) is aten.linear:
        return (*value.shape[:-1], traced[-1])
    batched = value.dim() == argument(node, "weight").meta["val"].dim()
    return (value.shape[0], *traced[1:]) if batched else tuple(traced)


def blocks(
    node: fx.Node, value: Tensor, output: Tensor, sample: PositionSample | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield a call's input and its value as matrices, a few samples at a time.

    Args:
        node: a convolution or linear layer.
        value: its input.
        output: its value.
        sample: which positions to take; None for all.

    Yields:
        The input, groups x features x positions, and the value, groups x outputs per group x
        positions. ``weight_rows`` times the input is the value without its bias.

    """
    if packet_of(node) is aten.linear:
        if sample is not None and value.dim() > 2:
            rows = sample.draw(value.shape[1], value[0, 0, ..., 0].numel())
            value, output = value[:, rows], output[:, rows]
        value, output = value.flatten(0, -2), output.flatten(0, -2)
        for x, y in zip(value.split(_per(value[:1])), output.split(_per(value[:1])), strict=True):
            yield x.T.unsqueeze(0), y.T.unsqueeze(0)
        return
    weight, groups = argument(node, "weight").meta["val"], argument(node, "groups")
    if value.dim() < weight.dim():
        value, output = value.unsqueeze(0), output.unsqueeze(0)
    size = _per(output[:1, :1], weight[0].numel() * groups)
    for x, y in zip(value.split(size), output.split(size), strict=True):
        rows = sample.draw(y.shape[2], y[0, 0, 0].numel()) if sample is not None else slice(None)
        made = y[:, :, rows].transpose(0, 1).flatten(1).unflatten(0, (groups, -1))
        yield _features(node, x, rows), made


@dataclass(frozen=True, eq=False)
class PositionSample:
    """Draws positions of large images, where neighbouring positions are similar.

    Attributes:
        limit: largest number of positions per sample, rounded up to whole rows.
        random: the generator of the draw.

    """

    limit: int
    random: torch.Generator

    def draw(self, rows: int, width: int) -> Tensor | slice:
        """Return the indices of the drawn rows, or all rows."""
        wanted = -(-self.limit // max(width, 1))
        if wanted >= rows:
            return slice(None)
        return torch.randperm(rows, generator=self.random)[:wanted].sort().values


def _per(sample: Tensor, times: int = 1) -> int:
    """The number of samples in a block."""
    return max(1, BLOCK_ELEMENTS // max(1, sample.numel() * times))


def _windows(node: fx.Node, value: Tensor, rows: Tensor | slice = slice(None)) -> Tensor:
    """View a convolution's padded input as channels x kernel x samples x positions.

    This is a view without a copy, unless only some rows of positions are taken.
    """
    kernel = argument(node, "weight").meta["val"].shape[2:]
    dims = len(kernel)
    stride, dilation = (spread(argument(node, name), dims) for name in ("stride", "dilation"))
    around = paddings(argument(node, "padding"), kernel, dilation)
    value = F.pad(value, [size for pair in reversed(around) for size in pair])
    sizes = zip(kernel, stride, dilation, strict=True)
    for dim, (size, step, apart) in enumerate(sizes, start=2):
        value = value.unfold(dim, apart * (size - 1) + 1, step)[..., ::apart]
        if dim == 2:
            value = value[:, :, rows]
    return value.permute(1, *range(2 + dims, 2 + 2 * dims), 0, *range(2, 2 + dims))


def _features(node: fx.Node, value: Tensor, rows: Tensor | slice) -> Tensor:
    """Return a convolution's input at rows of positions: groups x features x positions."""
    dims = value.dim() - 2
    laid = _windows(node, value, rows)
    found: Tensor = (
        laid.flatten(1 + dims).flatten(0, dims).unflatten(0, (argument(node, "groups"), -1))
    )
    return found


def drawn_features(
    node: fx.Node, value: Tensor, limit: int | None, generator: torch.Generator | None
) -> Tensor:
    """Return a layer's input at positions drawn from all samples: positions x features.

    Args:
        node: a linear layer, or a convolution without groups.
        value: its input.
        limit: the largest number of positions; None for all.
        generator: of the draw.

    """
    if packet_of(node) is aten.linear:
        rows = value.flatten(0, -2)
        return rows[_draw(len(rows), limit, generator).to(rows.device)]
    dims = argument(node, "weight").meta["val"].dim() - 2
    windows = _windows(node, value if value.dim() == dims + 2 else value.unsqueeze(0))
    places = windows.shape[1 + dims :]
    drawn = _draw(places.numel(), limit, generator).to(value.device)
    whole: list[Any] = [slice(None)] * (1 + dims)
    picked: Tensor = windows[(*whole, *torch.unravel_index(drawn, places))]
    found: Tensor = picked.flatten(0, dims).T
    return found


def _draw(count: int, limit: int | None, generator: torch.Generator | None) -> Tensor:
    """Indices of positions: at most ``limit`` of ``count``."""
    if limit is None or count <= limit:
        return torch.arange(count)
    return torch.randperm(count, generator=generator)[:limit]


def weight_rows(node: fx.Node, weight: Tensor) -> Tensor:
    """Return a weight as matrices: groups x outputs per group x features."""
    groups: int = 1 if packet_of(node) is aten.linear else argument(node, "groups")
    found: Tensor = weight.flatten(1).unflatten(0, (groups, -1))
    return found
