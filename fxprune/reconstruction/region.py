"""The part of a program that a layer's reconstruction looks at, cut out of the graph.

A region begins at a layer's calls and ends some operations later. What it needs from elsewhere, a
shortcut for instance, it reads from the frontier of a walk that stands just before the layer, or
computes from that. Its outputs are values that the dense program has as well.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from fxprune.calibration.layer_matrix import Layer, channel_axis
from fxprune.graph.node_args import argument, packet_of
from fxprune.graph.operators import operator_of
from fxprune.graph.program import Program
from fxprune.reconstruction.incremental_run import Values, compute

aten = torch.ops.aten
SMALL = 1e-6  # a norm's scale under which a channel says nothing about the layer before it


@dataclass(frozen=True, eq=False)
class Region:
    """Some operations from a layer on.

    Attributes:
        layer: where it begins.
        nodes: what has to run, in graph order.
        outputs: what is to stay as in the dense program, in graph order.
        forms: what is called instead of a node's operator, which has too few derivatives.

    """

    layer: Layer
    nodes: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    forms: Mapping[fx.Node, Callable[..., Any]] = field(default_factory=dict)

    def run(self, program: Program, frontier: Values, given: Mapping[str, Tensor]) -> Values:
        """Return the frontier and what the region makes of it, with other stored tensors."""
        values = dict(frontier)
        for node in self.nodes:
            values[node] = compute(program, node, values, given, self.forms.get(node))
        return values


def comparable(program: Program, dense: Program) -> frozenset[fx.Node]:
    """Return the nodes that compute what the dense node of their name does, for the same readers.

    Readers matter because a pass may leave a node its name and give it another meaning: where a
    norm was folded away, the layer before it has the norm's readers.
    """
    named = {node.name: node for node in dense.graph.nodes}
    return frozenset(
        node
        for node in program.graph.nodes
        if (other := named.get(node.name)) is not None
        and (node.target == other.target or _implanted(node, other))
        and {user.name for user in node.users} == {user.name for user in other.users}
    )


def _implanted(node: fx.Node, other: fx.Node) -> bool:
    """Whether a concat stands where the dense program has a layer, as implants leave it."""
    return packet_of(node) is aten.cat and operator_of(other).is_layer


def affine_tail(call: fx.Node) -> tuple[fx.Node, ...]:
    """Return a call and what follows it as long as that is affine in each of its channels.

    Batch norms in evaluation mode, sums and concats along channels: where only they lie between a
    layer and a value, the layer's best weights for that value are a least-squares problem.
    """
    chain = [call]
    while len(chain[-1].users) == 1:
        (user,) = chain[-1].users
        if not _is_affine(call, chain[-1], user):
            break
        chain.append(user)
    return tuple(chain)


def _is_affine(call: fx.Node, source: fx.Node, user: fx.Node) -> bool:
    kind, dims = packet_of(user), source.meta["val"].dim()
    if operator_of(user).identity:
        return True
    if kind is aten.batch_norm:
        stored = all(isinstance(item, fx.Node) for item in user.args[3:5])
        channels = channel_axis(call) % dims == 1
        return user.args[0] is source and stored and not user.args[5] and channels
    if kind is aten.cat:
        along = (channel_axis(call) - argument(user, "dim")) % dims == 0
        return along and list(argument(user, "tensors")).count(source) == 1
    if kind is not aten.add or argument(user, "alpha") != 1:
        return False
    others = [item for item in user.args[:2] if item is not source]
    same = user.meta["val"].shape == source.meta["val"].shape
    return len(others) == 1 and isinstance(others[0], fx.Node) and same


def channels(chain: tuple[fx.Node, ...]) -> slice:
    """Return which channels of an affine tail's last value are those of its call."""
    axis, start = channel_axis(chain[0]), 0
    for source, node in itertools.pairwise(chain):
        if packet_of(node) is aten.cat:
            parts = list(argument(node, "tensors"))
            start += sum(part.meta["val"].shape[axis] for part in parts[: parts.index(source)])
    return slice(start, start + chain[0].meta["val"].shape[axis])


def own_channels(chain: tuple[fx.Node, ...], value: Tensor) -> Tensor:
    """Return the part of the tail's last value that its call has a share in."""
    own = channels(chain)
    return value.narrow(channel_axis(chain[0]), own.start, own.stop - own.start)


def slope(program: Program, chain: tuple[fx.Node, ...]) -> Tensor | None:
    """Return by what each channel is multiplied along an affine tail; None for one everywhere.

    A channel whose value hardly depends on the layer has the slope infinity, so that dividing by
    it asks nothing of the layer.
    """
    found: Tensor | None = None
    for number, node in enumerate(chain):
        if packet_of(node) is not aten.batch_norm:
            continue
        gamma, _, _, variance = (_stored(program, item) for item in node.args[1:5])
        assert variance is not None
        eps: Any = node.args[7]
        scale = (variance + eps).rsqrt() * (1.0 if gamma is None else gamma)
        scale = scale[channels(chain[: number + 1])]
        found = scale if found is None else found * scale
    if found is None:
        return None
    return torch.where(found.abs() < SMALL, torch.inf, found)


def _stored(program: Program, item: Any) -> Tensor | None:
    if not isinstance(item, fx.Node):
        return None
    return program.tensor(str(item.target)).detach().double()


def along_channels(call: fx.Node, values: Tensor) -> Tensor:
    """Shape one value per channel so that it multiplies a call's value."""
    return values.view(-1, *[1] * (-channel_axis(call) - 1))


def cut(
    layer: Layer, lookahead: int, usable: frozenset[fx.Node], *, raw: bool = False
) -> Region | None:
    """Cut the region that goes some operations beyond a layer's last call.

    Args:
        layer: where it begins.
        lookahead: how many operations it goes on, data movement aside; with none, to the end of
            the affine tail of every call.
        usable: values that can be compared with the dense program's.
        raw: look at values before batch norms too. Their channels may differ by orders of
            magnitude, which the norm makes alike, so that few of them would count; without this,
            the norm's own value is looked at instead.

    Returns:
        The region, or None if it has no value that can be compared.

    """
    if lookahead:
        outputs = _following(layer, lookahead)
        outputs = outputs if raw else [_normed(node) for node in outputs]
    else:
        tails = [[node for node in affine_tail(call) if node in usable] for call in layer.calls]
        outputs = [tail[-1] for tail in tails if tail]
        if len(outputs) < len(layer.calls):
            return None
    outputs = [node for node in dict.fromkeys(outputs) if node in usable]
    return Region(layer, _needed(layer, outputs), tuple(outputs)) if outputs else None


def _following(layer: Layer, lookahead: int) -> list[fx.Node]:
    """The layer's calls, and the operations after them that depend on them."""
    below, found, beyond = set(layer.calls), list(layer.calls), 0
    calls = set(layer.calls[1:])  # those still to come
    for node in _onwards(layer.node):
        calls.discard(node)
        if node.op != "call_function" or not below.intersection(node.all_input_nodes):
            continue
        below.add(node)
        if _computes_nothing(node) or not _has_slopes(node.meta.get("val")):
            continue
        found.append(node)
        beyond += not calls
        if beyond >= lookahead:
            break
    return [node for node in (layer.node, *_onwards(layer.node)) if node in found]


def _has_slopes(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _computes_nothing(node: fx.Node) -> bool:
    """Whether a call is no operation to look ahead."""
    known = operator_of(node)
    moves = known.moves_data or known.identity or known.kind == "cast"
    return moves or node.target is operator.getitem


def _normed(node: fx.Node) -> fx.Node:
    """The batch norm behind a node that nothing else reads, or the node itself."""
    match list(node.users):
        case [user] if packet_of(user) is aten.batch_norm and user.args[0] is node:
            return user
    return node


def _onwards(node: fx.Node) -> Iterator[fx.Node]:
    """The nodes after one, in graph order."""
    following = node.next
    while following.op != "root":
        yield following
        following = following.next


def _needed(layer: Layer, outputs: list[fx.Node]) -> tuple[fx.Node, ...]:
    """What has to run for the outputs, given all values before the layer."""
    after = [layer.node, *_onwards(layer.node)]
    open_nodes = set(outputs)
    needed = []
    for node in reversed(after):
        if node in open_nodes and node.op == "call_function":
            needed.append(node)
            open_nodes.update(node.all_input_nodes)
    return tuple(reversed(needed))
