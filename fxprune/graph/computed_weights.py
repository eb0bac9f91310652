"""Weights that forward computes from parameters in a way that mixes their elements.

Spectral norm divides a weight by a number that depends on all of it; weight standardisation and
normalised embeddings do likewise. Were the computation kept, removing some channels would change
the weights of all others. It is replaced by its result, a parameter, which removal only slices.
Computations that treat every element by itself, or only move elements, stay: slices of them are
what they compute from slices. So do products of parameters (low-rank weights, small networks that
make a bias), unless an operand also enters the result by another way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxprune.graph.comparison import relative_error
from fxprune.graph.functionalize import base_of, is_view, state_of, written
from fxprune.graph.program import Program
from fxprune.graph.surgery import drop_unused, read_tensor, replace_node, set_tensor, unused_name

aten = torch.ops.aten
SETTLED = 1e-5  # relative: a weight that changes by less between two calls does not change
# Operators that move elements and do not compute; views are known by their schemas.
MOVES = frozenset({
    "cat", "stack", "index", "index_select", "gather", "embedding", "flip", "roll", "repeat",
    "repeat_interleave", "clone", "pad", "constant_pad_nd", "tril", "triu", "_to_copy", "getitem",
    "slice_scatter", "select_scatter", "tile", "pixel_shuffle", "pixel_unshuffle", "diag_embed",
})  # fmt: skip
# Operators that sum over some dimensions of their operands and lose them.
CONTRACTS = frozenset({
    "sum", "mean", "amax", "amin", "prod", "norm", "linalg_vector_norm", "linalg_matrix_norm",
    "frobenius_norm", "var", "std", "logsumexp", "mv", "mm", "bmm", "dot", "vdot", "matmul",
    "addmm", "addmv", "baddbmm", "linear", "einsum", "conv1d", "conv2d", "conv3d", "outer",
})  # fmt: skip


@dataclass(frozen=True)
class _Origin:
    """Which tensors a constant is computed from.

    Attributes:
        kept: by name, those whose elements it has one by one.
        summed: those that it has sums over.

    """

    kept: frozenset[str] = frozenset()
    summed: frozenset[str] = frozenset()

    @property
    def mixed(self) -> bool:
        """Whether an element depends on itself and on others of the same tensor."""
        return bool(self.kept & self.summed)


def bake_computed_weights(program: Program) -> int:
    """Replace every computation that mixes the elements of a parameter by its result.

    Returns:
        How many results became parameters.

    """
    origins = _origins(program)
    mixed = {node for node, origin in origins.items() if origin.mixed}
    results = [node for node in mixed if any(user not in mixed for user in node.users)]
    names = {}
    for node in sorted(results):
        value = _evaluate(program, node, {})
        wanted = _name(program, origins[node])
        name = unused_name(program, wanted)
        trains = any(program.tensor(source).requires_grad for source in origins[node].kept)
        set_tensor(
            program, name, value.clone().requires_grad_(trains and value.is_floating_point())
        )
        replace_node(program, node, read_tensor(program, name, node))
        names[name] = wanted
    if names:
        drop_unused(program)
        _rename(program, names)
    return len(names)


def settle_rewritten_weights(program: Program) -> int:
    """Store, once, what forward writes at every call although nothing but the tensor decides it.

    A weight that forward divides by its own norm is the same after every call. Where a second
    call would change it again, as a counter is changed, it stays state.

    Returns:
        How many tensors are no longer written.

    """
    count = 0
    for store in [node for node in program.graph.nodes if node.target is aten.copy_.default]:
        place, value = base_of(store.args[0]), store.args[1].args[0]
        if place.op != "get_attr" or not _depends_on_tensors(value):
            continue
        once = _evaluate(program, value, {})
        twice = _evaluate(program, value, {place: once})
        if relative_error(once, twice) > SETTLED or _is_read_elsewhere(place, value):
            continue
        set_tensor(program, str(place.target), once)
        program.graph.erase_node(store)
        value.replace_all_uses_with(place)
        drop_unused(program)
        count += 1
    return count


def constant_value(program: Program, node: fx.Node) -> Tensor | None:
    """Return what a node computes if stored tensors alone decide it; None if anything else does."""
    if not _depends_on_tensors(node) or any(
        str(source.target) in state_of(program) for source in _sources(node)
    ):
        return None
    value = _evaluate(program, node, {})
    return value if isinstance(value, Tensor) else None


def _depends_on_tensors(value: fx.Node) -> bool:
    """Whether a value can be computed from stored tensors alone, and again at any time."""
    return all(
        node.op == "get_attr" or (node.op == "call_function" and _is_repeatable(node))
        for node in _sources(value)
    )


def _is_read_elsewhere(place: fx.Node, value: fx.Node) -> bool:
    """Whether anything reads a tensor's old value but what computes the new one and stores it."""
    inside = _sources(value)
    held = [node for node in inside if node is place or place in node.all_input_nodes]
    readers = {user for node in held if node is not value for user in node.users} - inside
    return any(user.target is not aten.detach.default for user in readers)


def _sources(value: fx.Node) -> set[fx.Node]:
    """A node and all that it is computed from."""
    found, queue = {value}, [value]
    while queue:
        fresh = set(queue.pop().all_input_nodes) - found
        found |= fresh
        queue += fresh
    return found


def _origins(program: Program) -> dict[fx.Node, _Origin]:
    """Find the values that depend on stored tensors alone, and on which."""
    state = set(state_of(program))
    found: dict[fx.Node, _Origin] = {}
    for node in program.graph.nodes:
        if node.op == "get_attr" and str(node.target) not in state:
            stored = isinstance(node.meta.get("val"), Tensor)
            found[node] = _Origin(frozenset({str(node.target)}) if stored else frozenset())
        elif node.op == "call_function" and all(source in found for source in node.all_input_nodes):
            if not _is_repeatable(node):
                continue
            kept = frozenset().union(*(found[source].kept for source in node.all_input_nodes))
            summed = frozenset().union(*(found[source].summed for source in node.all_input_nodes))
            found[node] = _combined(node, kept, summed)
    return found


def _is_repeatable(node: fx.Node) -> bool:
    """Whether a call gives the same value whenever it is made, and does nothing else."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return getattr(node.target, "__module__", "") == "_operator"
    return not written(node) and torch.Tag.nondeterministic_seeded not in node.target.tags


def _combined(node: fx.Node, kept: frozenset[str], summed: frozenset[str]) -> _Origin:
    name = getattr(node.target, "_opname", getattr(node.target, "__name__", ""))
    tags = getattr(node.target, "tags", ())
    if name in CONTRACTS:
        return _Origin(frozenset(), kept | summed)
    if name in MOVES or is_view(node) or torch.Tag.pointwise in tags:
        return _Origin(kept, summed)
    return _Origin(kept, kept | summed)


def _name(program: Program, origin: _Origin) -> str:
    """The name of the largest tensor that the result has element by element."""
    largest = max(sorted(origin.kept), key=lambda name: program.tensor(name).numel())
    return largest.removesuffix("_orig")


def _rename(program: Program, names: dict[str, str]) -> None:
    """Give tensors the names that they were to have, where those have become free."""
    for name, wanted in names.items():
        if name == wanted or wanted in program.graph_module.state_dict():
            continue
        set_tensor(program, wanted, program.tensor(name))
        for node in program.tensor_nodes():
            if node.target == name:
                node.target = wanted
    drop_unused(program)


def _evaluate(program: Program, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    """Compute a node from the stored tensors."""
    if node in values:
        return values[node]
    if node.op == "get_attr":
        found = program.tensor(str(node.target))
    else:
        args, kwargs = fx.map_arg(
            (node.args, node.kwargs), lambda source: _evaluate(program, source, values)
        )
        with torch.no_grad():
            assert callable(node.target)
            found = node.target(*args, **kwargs)
    values[node] = found
    return found
