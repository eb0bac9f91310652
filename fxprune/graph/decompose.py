"""The same computation in other operators: those that exporters or tables of patterns know."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from fxprune.graph.computed_weights import constant_value
from fxprune.graph.node_args import argument, arguments
from fxprune.graph.program import Program
from fxprune.graph.surgery import insert_call, replace_node

aten = torch.ops.aten


def spell_attention(program: Program) -> int:
    """Write attention as products and a softmax: the exporter's own decomposition fails on some.

    ``softmax(q k' * scale + mask) v``, exact for additive and boolean masks, causal ones, query
    heads that share keys, and queries that may see no key. Returns how many there were.
    """
    target = aten.scaled_dot_product_attention.default
    found = [node for node in program.graph.nodes if node.target is target]
    for node in found:
        _spell_one(program, node)
    return len(found)


def _spell_one(program: Program, node: fx.Node) -> None:
    given = arguments(node)
    query, key, value, mask = (given[name] for name in ("query", "key", "value", "attn_mask"))
    shape, keys = query.meta["val"].shape, key.meta["val"].shape
    scale = given["scale"]
    scale = 1 / math.sqrt(shape[-1]) if scale is None else scale

    def call(target: Any, *args: Any) -> fx.Node:
        return insert_call(program, node, target, args)

    if given["enable_gqa"] and shape[-3] != keys[-3]:
        times = shape[-3] // keys[-3]
        key, value = (call(aten.repeat_interleave.self_int, x, times, -3) for x in (key, value))
    scores = call(aten.matmul.default, query, call(aten.transpose.int, key, -2, -1))
    scores = call(aten.mul.Tensor, scores, scale)
    if given["is_causal"]:
        allowed = torch.ones(shape[-2], keys[-2], dtype=torch.bool).tril()
        blocked = torch.zeros(allowed.shape).masked_fill(~allowed, -math.inf)
        name = f"causal_mask_{node.name}"
        program.graph_module.register_buffer(name, blocked.to(query.meta["val"].dtype))
        with program.graph.inserting_before(node):
            mask = program.graph.get_attr(name)
    seen = None
    if isinstance(mask, fx.Node) and not given["is_causal"]:
        mask, seen = _finite_mask(program, node, mask, scores)
    if mask is not None:
        scores = call(aten.add.Tensor, scores, mask)
    weights = call(aten.softmax.int, scores, -1)
    result = call(aten.matmul.default, weights, value)
    if seen is not None:
        zero = call(aten.zeros_like.default, result)
        result = call(aten.where.self, seen, result, zero)
    replace_node(program, node, result)


def _finite_mask(
    program: Program, node: fx.Node, mask: fx.Node, scores: fx.Node
) -> tuple[fx.Node, fx.Node | None]:
    """Return an additive mask without infinities, and which queries may see any key.

    Attention gives zeros where a query may see none, as in a row that is all padding; the softmax
    of a row of infinities is NaN. The second value is None if it is known that there is no such
    row.
    """

    def call(target: Any, *args: Any) -> fx.Node:
        return insert_call(program, node, target, args)

    dtype, constant = mask.meta["val"].dtype, constant_value(program, mask)
    low = torch.finfo(node.meta["val"].dtype).min / 2
    if dtype == torch.bool:
        sees_all = constant is not None and bool(constant.any(-1).all())
        seen = None if sees_all else call(aten.any.dim, mask, -1, True)
        hidden = call(aten.logical_not.default, mask)
        zeros = call(aten.zeros_like.default, scores)
        return call(aten.masked_fill.Scalar, zeros, hidden, low), seen
    if constant is not None and bool(constant.amax(-1).gt(-math.inf).all()):
        return mask, None
    seen = call(aten.gt.Scalar, call(aten.amax.default, mask, [-1], True), low)
    return call(aten.clamp.default, mask, low), seen


def spell_clamps(program: Program) -> int:
    """Write bounds that are stored scalars as numbers; returns how many clamps had such.

    The exporter writes them as minima and maxima, whose fusion into one clip (ONNX Script 0.7)
    loses bounds where several clamps read one value.
    """
    found = [node for node in program.graph.nodes if node.target is aten.clamp.Tensor]
    count = 0
    for node in found:
        given = arguments(node)
        bounds = [given[name] for name in ("min", "max")]
        stored = [bound for bound in bounds if bound is not None]
        if all(bound.op == "get_attr" and bound.meta["val"].dim() == 0 for bound in stored):
            low, high = (
                None if bound is None else program.tensor(str(bound.target)).item()
                for bound in bounds
            )
            call = insert_call(program, node, aten.clamp.default, (given["self"], low, high))
            replace_node(program, node, call)
            count += 1
    return count


def spell_means(program: Program) -> int:
    """Write means over all places of images as average pooling; returns how many."""
    found = [node for node in program.graph.nodes if _averages_places(node)]
    for node in found:
        pool = insert_call(program, node, aten.adaptive_avg_pool2d.default, (node.args[0], [1, 1]))
        if not argument(node, "keepdim"):
            pool = insert_call(program, node, aten.flatten.using_ints, (pool, 1))
        replace_node(program, node, pool)
    return len(found)


def _averages_places(node: fx.Node) -> bool:
    if node.target is not aten.mean.dim or argument(node, "dtype") is not None:
        return False
    x, dims = node.args[0], argument(node, "dim")
    value = x.meta.get("val") if isinstance(x, fx.Node) else None
    if not isinstance(value, Tensor) or value.dim() != 4 or dims is None:
        return False
    return sorted(dim % 4 for dim in dims) == [2, 3]
