"""The part of a program that is computed to reconstruct a layer.

A region begins at a layer's calls and ends some operations later. Other values that it needs, such
as a shortcut, are read from an incremental run that has stopped just before the layer, or computed
from its values. The outputs of a region are values that the dense program has as well.
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
MIN_NORM_SCALE = 1e-6  # below this, a channel's value hardly depends on the layer before the norm


@dataclass(frozen=True, eq=False)
class Region:
    """A layer and some of the operations after it.

    Attributes:
        layer: the layer that it begins with.
        nodes: the nodes to run, in graph order.
        outputs: the nodes whose values are compared with the dense program's, in graph order.
        wanted: the dense program's nodes for the outputs.
        forms: functions to call instead of the operators of nodes that lack derivatives.

    """

    layer: Layer
    nodes: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    wanted: tuple[fx.Node, ...] = ()
    forms: Mapping[fx.Node, Callable[..., Any]] = field(default_factory=dict)

    def run(self, program: Program, frontier: Values, given: Mapping[str, Tensor]) -> Values:
        """Return the values before the region and in it; ``given`` replaces stored tensors."""
        values = dict(frontier)
        for node in self.nodes:
            values[node] = compute(program, node, values, given, self.forms.get(node))
        return values


def comparable(program: Program, dense: Program) -> dict[fx.Node, fx.Node]:
    """Return the dense node for every node that computes the same for the same readers.

    Readers matter because a pass may keep a node's name and give it another meaning: where a norm
    was folded away, the layer before it has the norm's readers.
    """
    named = {node.name: node for node in dense.graph.nodes}
    found = {}
    for node in program.graph.nodes:
        other = named.get(node.name)
        if other is None or {x.name for x in node.users} != {x.name for x in other.users}:
            continue
        # An implant turns the dense program's layer into a concat.
        implanted = packet_of(node) is aten.cat and operator_of(other).is_layer
        if node.target == other.target or implanted:
            found[node] = other
    return found


def affine_tail(call: fx.Node) -> tuple[fx.Node, ...]:
    """Return a call and the nodes after it that are affine in each of its channels.

    These are batch norms in evaluation mode, sums, and concats along channels. If only they lie
    between a layer and a value, the best weights for that value solve a least-squares problem.
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
    """Return which channels of an affine tail's last value depend on its call."""
    axis, start = channel_axis(chain[0]), 0
    for source, node in itertools.pairwise(chain):
        if packet_of(node) is aten.cat:
            parts = list(argument(node, "tensors"))
            start += sum(part.meta["val"].shape[axis] for part in parts[: parts.index(source)])
    return slice(start, start + chain[0].meta["val"].shape[axis])


def own_channels(chain: tuple[fx.Node, ...], value: Tensor) -> Tensor:
    """Return the channels of a value at the tail's end that depend on its call."""
    own = channels(chain)
    return value.narrow(channel_axis(chain[0]), own.start, own.stop - own.start)


def slope(program: Program, chain: tuple[fx.Node, ...]) -> Tensor | None:
    """Return the factor of each channel along an affine tail; None if all are one.

    For a channel whose value hardly depends on the layer the factor is infinite, so that the error
    divided by it is zero.
    """
    found: Tensor | None = None
    for number, node in enumerate(chain):
        if packet_of(node) is not aten.batch_norm:
            continue
        gamma, variance = (
            program.tensor(str(item.target)).detach().double() if isinstance(item, fx.Node) else 1.0
            for item in (node.args[1], node.args[4])
        )
        eps: Any = node.args[7]
        scale = (variance + eps).rsqrt() * gamma
        scale = scale[channels(chain[: number + 1])]
        found = scale if found is None else found * scale
    if found is None:
        return None
    return torch.where(found.abs() < MIN_NORM_SCALE, torch.inf, found)


def along_channels(call: fx.Node, values: Tensor) -> Tensor:
    """Shape one value per channel so that it multiplies a call's value."""
    return values.view(-1, *[1] * (-channel_axis(call) - 1))


def cut(
    layer: Layer, lookahead: int, usable: Mapping[fx.Node, fx.Node], *, raw: bool = False
) -> Region | None:
    """Return the region from a layer to some operations after its last call.

    Args:
        layer: the layer that the region begins with.
        lookahead: number of operations after the layer, without data movement; with 0, the region
            ends with the affine tail of every call.
        usable: by node, the dense node that its value can be compared with.
        raw: compare values before batch norms too. Their channels may differ by orders of
            magnitude, so that few of them count; without this, the norm's output is compared
            instead.

    Returns:
        The region, or None if it has no value that can be compared.

    """
    if lookahead:
        outputs = _following(layer, lookahead)
        if not raw:  # the output of a batch norm stands for its input, if nothing else reads that
            users = [tuple(node.users) for node in outputs]
            outputs = [
                readers[0]
                if len(readers) == 1
                and packet_of(readers[0]) is aten.batch_norm
                and readers[0].args[0] is node
                else node
                for node, readers in zip(outputs, users, strict=True)
            ]
    else:
        tails = [[node for node in affine_tail(call) if node in usable] for call in layer.calls]
        outputs = [tail[-1] for tail in tails if tail]
        if len(outputs) < len(layer.calls):
            return None
    outputs = [node for node in dict.fromkeys(outputs) if node in usable]
    if not outputs:
        return None
    wanted = tuple(usable[node] for node in outputs)
    return Region(layer, _needed(layer, outputs), tuple(outputs), wanted)


def _following(layer: Layer, lookahead: int) -> list[fx.Node]:
    """The layer's calls, and the operations after them that depend on them."""
    below, found, beyond = set(layer.calls), list(layer.calls), 0
    calls = set(layer.calls[1:])  # those still to come
    for node in _onwards(layer.node):
        calls.discard(node)
        if node.op != "call_function" or not below.intersection(node.all_input_nodes):
            continue
        below.add(node)
        value, known = node.meta.get("val"), operator_of(node)
        moves = known.moves_data or known.identity or known.kind == "cast"
        if moves or node.target is operator.getitem or not isinstance(value, Tensor):
            continue
        if not (value.is_floating_point() or value.is_complex()):
            continue
        found.append(node)
        beyond += not calls
        if beyond >= lookahead:
            break
    return [node for node in (layer.node, *_onwards(layer.node)) if node in found]


def _onwards(node: fx.Node) -> Iterator[fx.Node]:
    """The nodes after one, in graph order."""
    following = node.next
    while following.op != "root":
        yield following
        following = following.next


def _needed(layer: Layer, outputs: list[fx.Node]) -> tuple[fx.Node, ...]:
    """The nodes that the outputs depend on, from the layer's first call on."""
    after = [layer.node, *_onwards(layer.node)]
    open_nodes = set(outputs)
    needed = []
    for node in reversed(after):
        if node in open_nodes and node.op == "call_function":
            needed.append(node)
            open_nodes.update(node.all_input_nodes)
    return tuple(reversed(needed))
