"""What a program costs: parameters, multiply-accumulates and bytes of weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxprune.graph.macs import Place, every_dimension
from fxprune.graph.operators import operator_of
from fxprune.graph.program import Program, shape_of

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
        macs = operator_of(node).macs
        for places in macs(node) if macs else ():
            yield Term("macs", node, 1.0 / batch, places)


def batch_of(program: Program) -> int:
    """Samples in the example inputs; a program of fixed size counts as one sample."""
    leaves = pytree.tree_leaves(program.example_inputs)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    dynamic = zip(tensors, program.dynamic, strict=False)
    return next((int(tensor.shape[0]) for tensor, dims in dynamic if 0 in dims), 1)
