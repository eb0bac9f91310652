"""Where attention multiplies: the layers that make queries, keys and values, head by head."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxprune.graph.facts import Slot
from fxprune.graph.node_args import arguments, packet_of
from fxprune.graph.operators import operator_of
from fxprune.graph.program import Program, shape_of
from fxprune.structure.groups import Group

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Projection:
    """The part of a linear layer that belongs to one operand of attention, or reads its value.

    Attributes:
        call: the layer.
        weight: the name of its weight.
        bias: the name of its bias, if it has one.
        places: heads x width: the output of the layer (or, where it reads, the input) that holds
            each position of each head.
        dim: of the weight, that the places are of: 0 for outputs, 1 for inputs.

    """

    call: fx.Node
    weight: str
    bias: str | None
    places: Tensor
    dim: int = 0


@dataclass(frozen=True, eq=False)
class Attention:
    """A call of attention and its layers, or why they cannot be had.

    Attributes:
        node: the call.
        query, key, value: what makes its operands.
        out: what reads its value.

    """

    node: fx.Node
    query: Projection | str
    key: Projection | str
    value: Projection | str
    out: Projection | str


def attentions(program: Program) -> list[Attention]:
    """Return the program's calls of attention, in graph order."""
    return [
        _attention(program, node)
        for node in program.graph.nodes
        if packet_of(node) is aten.scaled_dot_product_attention
    ]


def written_out(program: Program) -> list[fx.Node]:
    """Return the softmaxes of attention that is written as products of its own."""
    found = []
    for node in program.graph.nodes:
        last = node
        while len(last.users) == 1 and operator_of(next(iter(last.users))).identity:
            (last,) = last.users
        products = {packet_of(user) for user in last.users} & {aten.matmul, aten.bmm, aten.einsum}
        if packet_of(node) is aten.softmax and products:
            found.append(node)
    return found


def _attention(program: Program, node: fx.Node) -> Attention:
    given = arguments(node)
    operands = [given[name] for name in ("query", "key", "value")]
    if len({shape_of(operand)[:-2] for operand in operands}) > 1:
        reason = "several query heads share one key head"
        return Attention(node, reason, reason, reason, reason)
    query, key, value = (_source(program, node, operand) for operand in operands)
    return Attention(node, query, key, value, _reader(program, node))


def _moves(node: Any) -> bool:
    """Whether a node only moves numbers about."""
    if not isinstance(node, fx.Node):
        return False
    known = operator_of(node)
    moves = known.moves_data or known.identity or known.kind == "cast"
    return (moves and known.kind != "pad") or node.target is operator.getitem


def _source(program: Program, node: fx.Node, operand: fx.Node) -> Projection | str:
    """The layer that makes an operand."""
    path = [operand]
    while _moves(path[-1]):
        path.append(path[-1].args[0])  # type: ignore[arg-type]
    call = path[-1]
    if packet_of(call) is not aten.linear:
        return f"{call.name} ({call.target}) lies between it and a linear layer"
    if beside := _read_beside(call, node):
        return f"{beside.name} ({beside.target}) also reads the output of {call.name}"
    given = arguments(call)
    ids = torch.arange(shape_of(call)[-1]).expand(shape_of(call)).contiguous()
    return _projection(program, call, given, _moved(path, ids))


def _reader(program: Program, node: fx.Node) -> Projection | str:
    """The layer that reads the value of attention."""
    path = [node]
    while True:
        users = [user for user in path[-1].users if packet_of(user) is not aten.sym_size]
        if len(users) != 1:
            return f"{path[-1].name} has {len(users)} readers"
        (user,) = users
        if not _moves(user):
            break
        path.append(user)
    if packet_of(user) is not aten.linear or user.args[0] is not path[-1]:
        return f"{user.name} ({user.target}) reads it and is not a linear layer"
    heads, width = shape_of(node)[-3], shape_of(node)[-1]
    ids = torch.arange(heads * width).view(heads, 1, width).expand(shape_of(node)).contiguous()
    spread = _moved(path[::-1], ids)
    last = spread.reshape(-1, spread.shape[-1])
    if len(last[0]) != heads * width or not bool((last == last[0]).all()):
        return f"{user.name} reads the heads of several tokens together"
    places = last[0].argsort().view(1, heads, 1, width)
    return _projection(program, user, arguments(user), places, dim=1)


def _projection(
    program: Program, call: fx.Node, given: dict[str, Any], ids: Tensor, dim: int = 0
) -> Projection | str:
    if ids.dim() < 3:
        return "its heads are not a separate dimension"
    table = ids.flatten(0, -4)[0, :, 0] if ids.dim() > 3 else ids[:, 0]
    if not bool((ids == table.unsqueeze(1)).all()):
        return f"the layout of the output of {call.name} differs between tokens"
    if len(table.unique()) < table.numel():
        return f"several heads share the output of {call.name}"
    weight, bias = given["weight"], given["bias"]
    for part in (weight, bias):
        if isinstance(part, fx.Node) and part.op != "get_attr":
            return f"{part.name} is computed, not stored"
        if isinstance(part, fx.Node) and len(program.readers(str(part.target))) > 1:
            return f"{part.target} is shared with another layer"
    names = str(weight.target), str(bias.target) if isinstance(bias, fx.Node) else None
    return Projection(call, *names, table, dim)


def _read_beside(call: fx.Node, attention: fx.Node) -> fx.Node | None:
    """Something that reads a layer's value, moved about, other than the one call of attention."""
    seen, waiting = {call}, [call]
    while waiting:
        for user in waiting.pop().users:
            if user is attention or user in seen or packet_of(user) is aten.sym_size:
                continue
            if not _moves(user):
                return user
            seen.add(user)
            waiting.append(user)
    return None


def _moved(path: list[fx.Node], ids: Tensor) -> Tensor:
    """Run the moves of a path, last one first, on identities instead of what its end computes."""
    values: dict[fx.Node, Any] = {path[-1]: ids}

    def value(source: fx.Node) -> Any:
        found = values.get(source, source.meta.get("val"))
        return found if isinstance(found, (Tensor, tuple, list)) else int(found)  # type: ignore[arg-type]

    for node in path[-2::-1]:
        args, kwargs = pytree.tree_map_only(fx.Node, value, (node.args, node.kwargs))
        values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    found: Tensor = values[path[0]]
    return found


def positions(
    groups: Sequence[Group], parts: Sequence[Projection]
) -> tuple[Group, list[int]] | str:
    """Return the group that is the positions of these parts, and the unit of each position.

    Or a reason: the positions cannot go, or not without something else.
    """
    for group in groups:
        slot = Slot(parts[0].weight, parts[0].dim)
        units = _units(group, slot, parts[0])
        if units is None:
            continue
        if group.frozen_because is not None:
            return group.frozen_because
        held = _held(parts)
        for slot in group.slots:
            whole = np.unique(group.places(slot)[1]).tolist()
            if not slot.tensor.startswith("node:") and sorted(held.get(slot, ())) != whole:
                return f"{slot} holds other parts of attention, which would have to shrink too"
        if any(_units(group, Slot(part.weight, part.dim), part) != units for part in parts):
            return "its positions have a different order in the two layers"
        return group, units
    return "the same positions cannot be removed from every head"


def _held(parts: Sequence[Projection]) -> dict[Slot, list[int]]:
    """By slot, the places that the parts have there."""
    found: dict[Slot, list[int]] = {}
    for part in parts:
        places = part.places.flatten().tolist()
        found.setdefault(Slot(part.weight, part.dim), []).extend(places)
        if part.bias is not None and part.dim == 0:
            found.setdefault(Slot(part.bias, 0), []).extend(places)
    return found


def _units(group: Group, slot: Slot, part: Projection) -> list[int] | None:
    """The unit of each position, if it is the same in every head."""
    if slot not in group.slots:
        return None
    units, indices = group.places(slot)
    table = np.full(max(int(part.places.max()), int(indices.max())) + 1, -1)
    table[indices] = units
    found = table[part.places.numpy()]
    same = bool((found == found[0]).all() and (found >= 0).all())
    return [int(unit) for unit in found[0]] if same else None
