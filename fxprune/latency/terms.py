"""The terms of a program's latency: layers on grids of widths, and all other operators."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import fx

from fxprune.graph.cost import batch_of
from fxprune.graph.program import Program, shape_of
from fxprune.latency.layer_config import LayerConfig
from fxprune.latency.layers import (
    Dim,
    Kind,
    Layer,
    layers,
    layers_of,
    operator_of,
    others,
    transpose_of,
)
from fxprune.latency.stairs import FINEST, SMALLEST, WidthSteps
from fxprune.planning.cost_evaluator import Floats
from fxprune.planning.cost_model import Shrinkage
from fxprune.structure.groups import Group

FINE = 64  # up to so many channels every block is measured
AXES = 3
KNOTS = (1, 9, 9, 5)  # per axis, by number of axes


@dataclass(frozen=True, eq=False)
class Axis:
    """Dimensions of a layer that shrink together.

    Attributes:
        length: its length when nothing is removed; divides the size of every dimension.
        shrink: reduction of the length by one removed unit of each group.
        block: kernels round the length up to a multiple of this.

    """

    length: int
    shrink: Floats
    block: int = 1

    def knots(self, count: int) -> tuple[int, ...]:
        """Return about ``count`` lengths, ascending: multiples, a short one and the full one."""
        step = max(self.block, SMALLEST)
        unit = step if self.length > step else 1
        if self.length > min(FINE, unit * count):
            unit = 2 * SMALLEST if self.length > SMALLEST else 1
            unit *= math.ceil(self.length / (unit * (count - 1)))
        least = (SMALLEST,) if unit > SMALLEST else ()
        return (*least, *range(unit, self.length, unit), self.length)


@dataclass(frozen=True, eq=False)
class Term:
    """One layer, or one other operator, over the axes that its time depends on.

    Attributes:
        axes: at most three axes.
        knots: for each axis, the lengths at which the time is known.
        configs: the layer at every combination of knots, the last axis fastest; empty if the time
            is proportional to the elements.
        elements: number of elements computed for one sample when nothing is removed.

    """

    axes: tuple[Axis, ...]
    knots: tuple[tuple[int, ...], ...]
    configs: tuple[LayerConfig, ...]
    elements: float = 0.0


def configs_of(program: Program) -> list[LayerConfig]:
    """Return the layers of a program as it is, for one sample."""
    return [_config(layer) for layer in layers(program, batch_of(program))]


def configs_of_node(node: fx.Node, batch: int) -> list[LayerConfig]:
    """Return the layers that a node stands for, for one sample: none, one or two."""
    return [_config(layer) for layer in layers_of(node, batch)]


def config_of(node: fx.Node, batch: int) -> LayerConfig | None:
    """Return the operator that a node is, for one sample; None if it is not timed, or is several.

    Attention is two matrix products.
    """
    found = [*layers_of(node, batch), *filter(None, [operator_of(node, batch)])]
    return _config(found[0]) if len(found) == 1 else None


def _config(layer: Layer) -> LayerConfig:
    return LayerConfig(layer.kind, layer.geometry, tuple(map(_size, layer.dims)))


def elements_of(program: Program) -> float:
    """Return how many elements a program computes for one sample outside of layers."""
    return sum(math.prod(shape_of(node)) for node in others(program)) / batch_of(program)


def latency_terms(
    program: Program, groups: Sequence[Group], steps: WidthSteps = FINEST
) -> list[Term]:
    """Return the terms of a program's latency over its groups.

    Args:
        program: the program before removal.
        groups: the groups that may shrink.
        steps: kernels round the channels of convolutions up to multiples of these.

    """
    shrinkage = Shrinkage.of(program, groups)
    batch = batch_of(program)
    of_layers = (_of_layer(layer, shrinkage, steps) for layer in layers(program, batch))
    return [*of_layers, *(_of_elements(node, shrinkage, batch) for node in others(program))]


def operator_terms(program: Program, groups: Sequence[Group]) -> list[Term]:
    """Return terms of what insert-observers times besides layers: operators and transposes."""
    shrinkage, batch = Shrinkage.of(program, groups), batch_of(program)
    found = []
    for node in program.graph.nodes:
        operator, image = operator_of(node, batch), transpose_of(node, batch)
        found += [_of_layer(one, shrinkage, FINEST) for one in (operator, image) if one is not None]
    return found


def _size(dim: Dim) -> int:
    return dim if isinstance(dim, int) else shape_of(dim[0])[dim[1]]


def _of_layer(layer: Layer, shrinkage: Shrinkage, steps: WidthSteps) -> Term:
    """Join dimensions that shrink in proportion into axes, and build a grid over the axes."""
    sizes = tuple(map(_size, layer.dims))
    tied: dict[bytes, list[int]] = {}
    shares: dict[int, Floats] = {}
    for number, (dim, size) in enumerate(zip(layer.dims, sizes, strict=True)):
        shrink = None if isinstance(dim, int) else shrinkage.at(*dim)
        if shrink is not None:
            shares[number] = shrink / size
            tied.setdefault(np.round(shrink / size, 12).tobytes(), []).append(number)
    members = list(tied.values())[:AXES]
    depthwise = layer.kind == "conv" and sizes[2] == 1 < sizes[0]
    step = steps.depthwise if depthwise else steps.dense
    axes = []
    for own in members:
        length = math.gcd(*(sizes[number] for number in own))
        channels = "conv" in layer.kind and length == max(sizes[number] for number in own)
        axes.append(Axis(length, shares[own[0]] * length, step if channels else 1))
    knots = tuple(axis.knots(KNOTS[len(axes)]) for axis in axes)
    configs = []
    for point in itertools.product(*knots):
        dims = list(sizes)
        for axis, own, length in zip(axes, members, point, strict=True):
            for number in own:
                dims[number] = sizes[number] // axis.length * length
        configs.append(LayerConfig(layer.kind, layer.geometry, _divisible(layer.kind, dims)))
    return Term(tuple(axes), knots, tuple(configs))


def _divisible(kind: Kind, dims: list[int]) -> tuple[int, ...]:
    """Round the channels of a grouped convolution down to what its groups divide."""
    if kind not in ("conv", "conv-transpose"):
        return tuple(dims)
    channels, outputs, per_group = dims
    if kind == "conv":
        groups = channels // per_group
        return channels, max(outputs // groups, 1) * groups, per_group
    groups = outputs // per_group
    return max(channels // groups, 1) * groups, outputs, per_group


def _of_elements(node: fx.Node, shrinkage: Shrinkage, batch: int) -> Term:
    shape = shape_of(node)
    found = [(size, shrinkage.at(node, dim)) for dim, size in enumerate(shape)]
    axes = tuple(Axis(size, shrink) for size, shrink in found if shrink is not None)[:AXES]
    knots = tuple((0, axis.length) for axis in axes)
    return Term(axes, knots, (), math.prod(shape) / batch)
