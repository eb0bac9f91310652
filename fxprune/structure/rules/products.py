"""Rules of products: any contraction; outer, inner and tensor products; chains."""

from __future__ import annotations

from typing import Any

from torch import fx

from fxprune.graph.node_args import arguments
from fxprune.structure.flow import Flow
from fxprune.structure.labels import DimLabels, Labels
from fxprune.structure.reads import NotCovered, Path, Read


def contract(
    flow: Flow, node: fx.Node, operands: list[tuple[Path, Labels, str]], result: str
) -> Labels:
    """Label a product given by letters, as einsum would write it.

    Dimensions with the same letter keep the same indices; a letter absent from ``result`` is
    summed over, which is where removed units cease to be read.

    Args:
        flow: the labels so far.
        node: the product.
        operands: argument position, labels, and one letter per dimension.
        result: one letter per dimension of the result.

    """
    entries: tuple[DimLabels, ...] = ()
    reads = []
    for letter in dict.fromkeys("".join(letters for _, _, letters in operands)):
        places = [
            (path, labels, dim)
            for path, labels, letters in operands
            for dim, name in enumerate(letters)
            if name == letter
        ]
        out_dim = result.find(letter)
        found = flow.align(node, [(labels, dim) for _, labels, dim in places], max(out_dim, 0))
        if out_dim >= 0:
            entries += found
        else:  # sizes of one are read as often as the others are long
            path, _, dim = next((at for at in places if at[1].shape[at[2]] > 1), places[0])
            reads.append(Read(path, dim))
    flow.reads[node] = flow.reads.get(node, ()) + tuple(reads)
    return Labels(tuple(node.meta["val"].shape), entries)


def dim_letters(count: int) -> str:
    """Return letters that name so many dimensions."""
    return "abcdefghijklmnopqrstuvw"[:count]


def outer(flow: Flow, node: fx.Node) -> Any:
    """All products of two vectors' elements."""
    left, right = flow.labels(node.args[0]), flow.labels(node.args[1])
    return contract(flow, node, [((0,), left, "x"), ((1,), right, "y")], "xy")


def inner(flow: Flow, node: fx.Node) -> Any:
    """A sum over the last dimensions of both."""
    left, right = flow.labels(node.args[0]), flow.labels(node.args[1])
    if not left.shape or not right.shape:
        raise NotCovered("it multiplies by a single number")
    letters = dim_letters(len(left.shape) + len(right.shape) - 2)
    first, second = letters[: len(left.shape) - 1], letters[len(left.shape) - 1 :]
    places: list[tuple[Path, Labels, str]] = [
        ((0,), left, first + "z"),
        ((1,), right, second + "z"),
    ]
    return contract(flow, node, places, letters)


def tensordot(flow: Flow, node: fx.Node) -> Any:
    """A sum over pairs of dimensions."""
    given = arguments(node)
    left, right = flow.labels(given["self"]), flow.labels(given["other"])
    letters = dim_letters(len(left.shape) + len(right.shape))
    first, second = letters[: len(left.shape)], list(letters[len(left.shape) :])
    summed = ""
    for dim, other in zip(given["dims_self"], given["dims_other"], strict=True):
        if left.shape[dim] != right.shape[other]:
            raise NotCovered("it sums one side before it multiplies")
        second[other % len(second)] = first[dim]
        summed += first[dim]
    result = "".join(letter for letter in [*first, *second] if letter not in summed)
    return contract(flow, node, [((0,), left, first), ((1,), right, "".join(second))], result)


def chain(flow: Flow, node: fx.Node) -> Any:
    """A product of several matrices; the first and the last may be vectors."""
    operands = [flow.labels(item) for item in arguments(node)["tensors"]]
    letters = "abcdefghijklmnopqrstuvw"
    places: list[tuple[Path, Labels, str]] = []
    for number, labels in enumerate(operands):
        pair = letters[number : number + 2]
        is_row = len(labels.shape) == 1
        places.append(((0, number), labels, pair[1 if number == 0 else 0] if is_row else pair))
    result = ("" if len(operands[0].shape) == 1 else letters[0]) + (
        "" if len(operands[-1].shape) == 1 else letters[len(operands)]
    )
    return contract(flow, node, places, result)
