"""Products that sum over a dimension: linear layers, matrix products, einsum, attention."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from fxprune.graph.node_args import argument, arguments
from fxprune.structure.flow import Flow, Rule
from fxprune.structure.labels import DimLabels, Labels
from fxprune.structure.reads import NotCovered, Path, Read
from fxprune.structure.rules.products import chain, contract, dim_letters, inner, outer, tensordot
from fxprune.structure.rules.record import OperatorRule, Remaining

aten = torch.ops.aten


def linear(flow: Flow, node: fx.Node) -> Any:
    """``y[..., o] = sum over i of x[..., i] w[o, i] + b[o]``."""
    given = arguments(node)
    operand, weight = flow.labels(given["input"]), flow.labels(given["weight"])
    batch = dim_letters(len(operand.shape) - 1)
    places = [((0,), operand, batch + "x"), ((1,), weight, "yx" if len(weight.shape) == 2 else "x")]
    if isinstance(given["bias"], fx.Node):
        places.append(((2,), flow.labels(given["bias"]), "y"))
    return contract(flow, node, places, batch + ("y" if len(weight.shape) == 2 else ""))  # type: ignore[arg-type]


def matmul(flow: Flow, node: fx.Node) -> Any:
    """Batched matrix product with broadcast batch dimensions."""
    left, right = flow.labels(node.args[0]), flow.labels(node.args[1])
    rank = max(len(left.shape), len(right.shape), 2)
    batch = dim_letters(rank - 2)
    left_letters = "y" if len(left.shape) == 1 else batch[rank - len(left.shape) :] + "xy"
    right_letters = "y" if len(right.shape) == 1 else batch[rank - len(right.shape) :] + "yz"
    result = batch + ("x" if len(left.shape) > 1 else "") + ("z" if len(right.shape) > 1 else "")
    _note_roles(flow, node, left, right)
    return contract(flow, node, [((0,), left, left_letters), ((1,), right, right_letters)], result)


def addmm(flow: Flow, node: fx.Node) -> Any:
    """``bias + left @ right``; the bias broadcasts."""
    bias, left, right = (flow.labels(operand) for operand in node.args[:3])
    batch = dim_letters(len(left.shape) - 2)
    result = batch + "xz"
    places: list[tuple[Path, Labels, str]] = [
        ((1,), left, batch + "xy"),
        ((2,), right, batch + "yz"),
    ]
    places.append(((0,), bias, result[len(result) - len(bias.shape) :]))
    if batch:
        _note_roles(flow, node, left, right)
    return contract(flow, node, places, result)


def bilinear(flow: Flow, node: fx.Node) -> Any:
    """``y[..., o] = sum over i, j of x[..., i] w[o, i, j] z[..., j] + b[o]``."""
    given = arguments(node)
    left, right = flow.labels(given["input1"]), flow.labels(given["input2"])
    batch = dim_letters(len(left.shape) - 1)
    places: list[tuple[Path, Labels, str]] = [
        ((0,), left, batch + "x"),
        ((1,), right, batch + "y"),
        ((2,), flow.labels(given["weight"]), "zxy"),
    ]
    if isinstance(given["bias"], fx.Node):
        places.append(((3,), flow.labels(given["bias"]), "z"))
    return contract(flow, node, places, batch + "z")


def einsum(flow: Flow, node: fx.Node) -> Any:
    """The product that its equation says; an ellipsis stands for leading dimensions."""
    equation, sources = node.args[0], node.args[1]
    labels = [flow.labels(source) for source in sources]  # type: ignore[union-attr]
    terms, _, result = str(equation).replace(" ", "").partition("->")
    operands = terms.split(",")
    if not result:
        counts = terms.replace(",", "").replace(".", "")
        single = "".join(sorted(c for c in set(counts) if counts.count(c) == 1))
        result = ("..." if "..." in terms else "") + single
    pairs = list(zip(operands, labels, strict=True))
    spans = [len(found.shape) - len(term.replace("...", "")) for term, found in pairs]
    dots = "0123456789"[: max(spans)]
    result = result.replace("...", dots)
    places: list[tuple[Path, Labels, str]] = []
    for number, ((term, found), span) in enumerate(zip(pairs, spans, strict=True)):
        places.append(((1, number), found, term.replace("...", dots[len(dots) - span :])))
    if len(labels) == 2:
        _note_einsum_roles(flow, [place[2] for place in places], labels, result)
    return contract(flow, node, places, result)


def _note_einsum_roles(flow: Flow, terms: list[str], labels: list[Labels], result: str) -> None:
    if flow.survey is None:
        return
    for term, found in zip(terms, labels, strict=True):
        for entry in found.entries:
            shared = term[entry.dim] in terms[0] and term[entry.dim] in terms[1]
            role = "heads" if shared and term[entry.dim] in result else "head_dim"
            flow.survey.note(role, entry.ids)


def _note_roles(flow: Flow, node: fx.Node, left: Labels, right: Labels) -> None:
    """Batch dimensions of a product of activations are heads, the others head widths."""
    if flow.survey is None:
        return
    for labels in (left, right):
        for entry in labels.entries:
            role = "heads" if entry.dim < len(labels.shape) - 2 else "head_dim"
            flow.survey.note(role, entry.ids)


def attention(flow: Flow, node: fx.Node) -> Any:
    """``softmax(q k' / sqrt(d) + mask) v``; query heads may share key and value heads."""
    given = arguments(node)
    query, key, value = (flow.labels(given[name]) for name in ("query", "key", "value"))
    batch = dim_letters(max(len(labels.shape) for labels in (query, key, value)) - 2)
    _note_roles(flow, node, query, key)
    _note_roles(flow, node, value, value)
    if given["enable_gqa"] and query.shape[-3] != key.shape[-3]:
        key, value = (_repeat_heads(labels, query.shape[-3]) for labels in (key, value))
    places: list[tuple[Path, Labels, str]] = [
        ((number,), labels, (batch + pair)[len(batch) + 2 - len(labels.shape) :])
        for number, labels, pair in ((0, query, "xy"), (1, key, "zy"), (2, value, "zv"))
    ]
    if isinstance(given["attn_mask"], fx.Node):
        mask = flow.labels(given["attn_mask"])
        places.append(((3,), mask, (batch + "xz")[len(batch) + 2 - len(mask.shape) :]))
    tokens = [*query.at(-2), *key.at(-2), *value.at(-2)]
    flow.freeze(node, tokens, "attention runs over these positions")
    return contract(flow, node, places, batch + "xv")


def _repeat_heads(labels: Labels, heads: int) -> Labels:
    dim = len(labels.shape) - 3
    times = heads // labels.shape[dim]
    entries = tuple(
        DimLabels(dim, entry.ids.repeat_interleave(times)) if entry.dim == dim else entry
        for entry in labels.entries
    )
    return Labels((*labels.shape[:dim], heads, *labels.shape[dim + 1 :]), entries)


def distances(flow: Flow, node: fx.Node) -> Any:
    """Distances between all pairs of rows: a sum over the last dimension."""
    left, right = flow.labels(node.args[0]), flow.labels(node.args[1])
    batch = dim_letters(len(node.meta["val"].shape) - 2)
    places: list[tuple[Path, Labels, str]] = [
        ((number,), labels, batch[len(batch) + 2 - len(labels.shape) :] + row + "z")
        for number, labels, row in ((0, left, "x"), (1, right, "y"))
    ]
    labels = contract(flow, node, places, batch + "xy")
    summed = Read((1,), len(right.shape) - 1)  # zeros on one side are not yet a distance of zero
    flow.reads[node] += (summed,)
    return labels


def pairwise(flow: Flow, node: fx.Node) -> Any:
    """The distance between the rows of two values at the same place."""
    given = arguments(node)
    if given["keepdim"]:
        raise NotCovered("it keeps the dimension that it sums over")
    left, right = flow.labels(given["x1"]), flow.labels(given["x2"])
    letters = dim_letters(max(len(left.shape), len(right.shape)) - 1) + "z"
    places: list[tuple[Path, Labels, str]] = [
        ((number,), labels, letters[len(letters) - len(labels.shape) :])
        for number, labels in enumerate((left, right))
    ]
    labels = contract(flow, node, places, letters[:-1])
    flow.reads[node] += (Read((1,), len(right.shape) - 1),)
    return labels


def added(letters: tuple[str, str, str]) -> Rule:
    """Make the rule of a product of the second and third argument that is added to the first."""

    def rule(flow: Flow, node: fx.Node) -> Any:
        bias, left, right = (flow.labels(operand) for operand in node.args[:3])
        result = letters[2]
        places: list[tuple[Path, Labels, str]] = [
            ((1,), left, letters[0]),
            ((2,), right, letters[1]),
            ((0,), bias, result[len(result) - len(bias.shape) :]),
        ]
        return contract(flow, node, places, result)

    return rule


def _attention(node: fx.Node, remaining: Remaining) -> None:
    width = node.args[0].meta["val"].shape[-1]  # type: ignore[union-attr]
    rank = len(remaining.before[0])
    if argument(node, "scale") is None and rank - 1 in remaining.operand(node.args[0]):
        node.update_kwarg("scale", 1.0 / math.sqrt(width))


RULES: dict[Any, OperatorRule] = {
    aten.linear: OperatorRule(linear),
    **dict.fromkeys(
        (aten.matmul, aten.mm, aten.bmm, aten.mv, aten.dot, aten.vdot, aten.linalg_matmul),
        OperatorRule(matmul),
    ),
    **dict.fromkeys((aten.addmm, aten.baddbmm), OperatorRule(addmm)),
    aten.addmv: OperatorRule(added(("xy", "y", "x"))),
    aten.addr: OperatorRule(added(("x", "y", "xy"))),
    aten.addbmm: OperatorRule(added(("bxy", "byz", "xz"))),
    aten.outer: OperatorRule(outer),
    aten.inner: OperatorRule(inner),
    aten.tensordot: OperatorRule(tensordot),
    aten.linalg_multi_dot: OperatorRule(chain),
    aten.bilinear: OperatorRule(bilinear),
    aten.pairwise_distance: OperatorRule(pairwise),
    aten.cdist: OperatorRule(distances),
    aten.einsum: OperatorRule(einsum),
    aten.scaled_dot_product_attention: OperatorRule(attention, _attention),
}
