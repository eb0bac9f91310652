"""What a program costs, and what it will cost with units gone, in closed form.

Every cost is a sum of products of dimensions: a linear layer's multiply-accumulates are its
rows times its outputs times its inputs. Removing units shrinks dimensions by known amounts, so the
cost after removal is exact without touching the program.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxprune.graph.calls import packet_of
from fxprune.graph.program import Program, shape_of
from fxprune.planning.macs import MACS, Place, every_dimension
from fxprune.structure.groups import Analysis, Group, analyse
from fxprune.structure.labels import Labels
from fxprune.structure.merging import Ints

Quantity = Literal["params", "macs", "weight_bytes"]


@dataclass(frozen=True)
class Cost:
    """Exact static costs of a program.

    Attributes:
        params: elements of all distinct parameters that the graph reads.
        macs: multiply-accumulates of one sample (convolutions, linear layers, matrix products,
            attention, recurrent cells).
        weight_bytes: bytes of those parameters and of the buffers that the graph reads.

    """

    params: int
    macs: int
    weight_bytes: int


@dataclass(frozen=True)
class Term:
    """A product of dimensions, times a constant, that counts towards one quantity."""

    quantity: Quantity
    node: fx.Node
    factor: float
    places: tuple[Place, ...]


def cost(program: Program) -> Cost:
    """Count parameters, multiply-accumulates per sample, and weight bytes."""
    totals = {"params": 0.0, "macs": 0.0, "weight_bytes": 0.0}
    for term in terms(program):
        sizes = (shape_of(node)[dim] for node, dim in term.places)
        totals[term.quantity] += term.factor * math.prod(sizes)
    return Cost(**{name: round(total) for name, total in totals.items()})


def activation_bytes(program: Program) -> int:
    """Bytes of all values that running one sample computes, as if none of them were shared."""
    values = (
        leaf
        for node in program.graph.nodes
        if node.op == "call_function"
        for leaf in pytree.tree_leaves(node.meta["val"])
        if isinstance(leaf, Tensor)
    )
    return max(
        1, sum(value.numel() * value.element_size() for value in values) // batch_of(program)
    )


def terms(program: Program) -> Iterator[Term]:
    """Yield the products of dimensions that a program's costs are sums of."""
    seen = set()
    for node in program.tensor_nodes():
        tensor = program.tensor(str(node.target))
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        places = every_dimension(node)
        if isinstance(tensor, torch.nn.Parameter):
            yield Term("params", node, 1.0, places)
        yield Term("weight_bytes", node, float(tensor.element_size()), places)
    batch = batch_of(program)
    for node in program.graph.nodes:
        rule = MACS.get(packet_of(node))
        for places in rule(node) if rule else ():
            yield Term("macs", node, 1.0 / batch, places)


def batch_of(program: Program) -> int:
    """Samples in the example inputs; a program of fixed size counts as one sample."""
    leaves = pytree.tree_leaves(program.example_inputs)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    dynamic = zip(tensors, program.dynamic, strict=False)
    return next((int(tensor.shape[0]) for tensor, dims in dynamic if 0 in dims), 1)


@dataclass(frozen=True, eq=False)
class CostModel:
    """Costs as a function of how many units each group loses.

    Attributes:
        groups: the groups, in the order of the counts.
        sizes: for each distinct dimension, its size now.
        shrink: dimensions x groups: by how much one unit of a group shrinks a dimension.
        factors: for each term, its constant.
        members: terms x dimensions per term: which dimensions it multiplies; the last dimension
            of ``sizes`` is one and fills up.
        rows: for each quantity, which terms belong to it.

    """

    groups: tuple[Group, ...]
    sizes: NDArray[np.float64]
    shrink: NDArray[np.float64]
    factors: NDArray[np.float64]
    members: Ints
    rows: dict[Quantity, NDArray[np.bool_]]

    def quantities(self, removed: NDArray[np.int64]) -> dict[Quantity, float]:
        """Return params, macs and weight_bytes once each group has lost so many units."""
        left = self.sizes - self.shrink @ removed
        products = self.factors * left[self.members].prod(axis=1)
        return {name: float(products[rows].sum()) for name, rows in self.rows.items()}

    def after(self, removed: NDArray[np.int64]) -> Cost:
        """Return the exact cost once each group has lost so many units."""
        return Cost(**{name: round(value) for name, value in self.quantities(removed).items()})


def cost_model(program: Program, groups: Sequence[Group]) -> CostModel:
    """Build the closed form of a program's costs over its groups.

    Frozen groups may be among ``groups``; their counts are to stay zero.
    """
    shrinkage = Shrinkage.of(program, groups)
    table: dict[tuple[Any, ...], int] = {}
    sizes: list[float] = []
    shrinks: list[NDArray[np.float64]] = []
    factors, members, quantities = [], [], []
    for term in terms(program):
        factor, dims = term.factor, []
        for node, dim in term.places:
            size = shape_of(node)[dim]
            shrink = shrinkage.at(node, dim)
            if shrink is None:
                factor *= size
                continue
            key = (size, shrink.tobytes())
            if key not in table:
                table[key] = len(sizes)
                sizes.append(float(size))
                shrinks.append(shrink)
            dims.append(table[key])
        factors.append(factor)
        members.append(dims)
        quantities.append(term.quantity)
    filler, width = len(sizes), max((len(dims) for dims in members), default=0)
    matrix = np.full((len(members), max(width, 1)), filler, dtype=np.int64)
    for row, dims in enumerate(members):
        matrix[row, : len(dims)] = dims
    kinds = np.array(quantities)
    names: tuple[Quantity, ...] = ("params", "macs", "weight_bytes")
    return CostModel(
        tuple(groups),
        np.array([*sizes, 1.0]),
        np.stack([*shrinks, np.zeros(len(groups))]),
        np.array(factors),
        matrix,
        {name: kinds == name for name in names},
    )


@dataclass(frozen=True, eq=False)
class Shrinkage:
    """By how much the units of groups shrink the dimensions of a program's values."""

    analysis: Analysis
    group_of: Ints  # by identity, the number of its group, or -1
    units: NDArray[np.float64]

    @classmethod
    def of(cls, program: Program, groups: Sequence[Group]) -> Shrinkage:
        """Analyse a program that the groups were found in."""
        analysis = analyse(program, groups[0].preference if groups else "heads")
        by_component = np.full(len(analysis.component), -1, dtype=np.int64)
        current = {group.name: group for group in analysis.groups}
        for number, group in enumerate(groups):
            by_component[current[group.name].components] = number
        units = np.array([len(group.units) for group in groups], dtype=np.float64)
        return cls(analysis, by_component[analysis.component], units)

    def at(self, node: fx.Node, dim: int) -> NDArray[np.float64] | None:
        """By how much one unit of each group shrinks a dimension; None where nothing does."""
        labels = self.analysis.flow.values.get(node)
        layer = next(labels.at(dim), None) if isinstance(labels, Labels) else None
        if layer is None:
            return None
        numbers = self.group_of[layer.ids.numpy()]
        numbers = numbers[(numbers >= 0) & (layer.ids.numpy() != 0)]
        if not numbers.size:
            return None
        places = np.bincount(numbers, minlength=len(self.units)).astype(np.float64)
        return places / self.units
