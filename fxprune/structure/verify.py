"""Exactness: removing units must equal never having read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxprune.errors import FxpruneError
from fxprune.graph.comparison import worst_error
from fxprune.graph.draws import FixedDraws
from fxprune.graph.functionalize import state_kept
from fxprune.graph.hooks import Call, run_with_hooks
from fxprune.graph.program import Program
from fxprune.structure.groups import Group
from fxprune.structure.reads import Read
from fxprune.structure.removal import Kept, identify, remaining_indices, remove_units

DRAW = 0.5  # what a standard normal draw gives while a removal is checked


@dataclass(frozen=True)
class RemovalCheck:
    """What zero-then-remove found.

    Attributes:
        error: the largest difference between the outputs, relative to the largest output; None
            where the check does not apply.
        reason: why it does not apply.

    """

    error: float | None
    reason: str | None = None


def verify_removal(
    program: Program,
    to_remove: Mapping[Group, Sequence[int]],
    inputs: tuple[Any, ...] | None = None,
) -> RemovalCheck:
    """Compare removal with zeroing everything that reads the units to remove (zero-then-remove).

    Works on copies; random operators give the same values in both (``FixedDraws``), and state that
    the model writes stays as it was. NaN and infinities on one side only count as an infinite
    difference. Where a normalisation mixes units to remove with others, removal changes its
    statistics and the two must differ; then there is no error, but a reason.

    Args:
        program: the program that the groups were found in.
        to_remove: for each group, the numbers of units.
        inputs: what to run on; by default the example inputs.

    """
    mixing = sorted(
        {name for group, units in to_remove.items() if len(units) for name in group.mixed_by}
    )
    if mixing:
        shown = ", ".join(mixing[:3]) + (", ..." if len(mixing) > 3 else "")
        return RemovalCheck(None, f"removed units are mixed with others by {shown}")
    inputs = program.example_inputs if inputs is None else inputs
    smaller = program.copy()
    remove_units(smaller, to_remove)
    with torch.no_grad(), FixedDraws(normal=DRAW):
        with state_kept(program):
            expected = _unread(program, to_remove, inputs)
        found = smaller(*inputs)
    return RemovalCheck(worst_error(pytree.tree_leaves(expected), pytree.tree_leaves(found)))


def _unread(
    program: Program, to_remove: Mapping[Group, Sequence[int]], inputs: tuple[Any, ...]
) -> Any:
    """Run the program with every read of the units to remove seeing zeros."""
    analysis, removed_mask = identify(program, to_remove)
    masks: dict[fx.Node, list[tuple[Read, Kept]]] = {}
    for node, reads in analysis.flow.reads.items():
        found = []
        for read in reads:
            source = _pick(node.args, read)
            kept = remaining_indices(analysis, analysis.flow.values.get(source), removed_mask)[0]
            if read.dim in kept:
                found.append((read, kept))
        if found:
            masks[node] = found

    def unread(call: Call) -> Any:
        args = call.args
        for read, kept in masks[call.node]:
            args = _zeroed(args, read.argument, read.dim, kept[read.dim])
        return call.value(*args)

    return run_with_hooks(program, inputs, dict.fromkeys(masks, unread))


def _pick(args: Any, read: Read) -> Any:
    for step in read.argument:
        args = args[step]
    return args


def _zeroed(args: Any, path: tuple[Any, ...], dim: int, keep: Tensor) -> Any:
    if not path:
        view = [1] * args.dim()
        view[dim] = -1
        return args * keep.to(args.device, args.dtype).view(view)
    changed = list(args)
    changed[path[0]] = _zeroed(changed[path[0]], path[1:], dim, keep)
    return tuple(changed) if isinstance(args, tuple) else changed


def sample_units(groups: Sequence[Group], share: float, seed: int = 0) -> dict[Group, list[int]]:
    """Choose random units of every removable group, at least one, never all.

    Groups with a single unit are left out, since something must stay.
    """
    random = np.random.default_rng(seed)
    chosen = {}
    for group in groups:
        total = len(group.units)
        if group.frozen_because is None and total > 1:
            count = min(max(round(share * total), 1), total - 1)
            chosen[group] = sorted(random.choice(total, count, replace=False).tolist())
    return chosen


def failing_groups(
    program: Program, chosen: Mapping[Group, Sequence[int]], limit: float
) -> dict[Group, str]:
    """Return the groups that cannot be removed as they should, and what happens instead.

    Groups that only fail together are told apart by halves: without those that are returned, the
    others can be removed.

    Args:
        program: the program that the groups were found in.
        chosen: for each group, the numbers of units to try.
        limit: the largest relative error that counts as exact.

    """
    fault = _fault(program, chosen, limit)
    if fault is None:
        return {}
    groups = list(chosen)
    if len(groups) == 1:
        return {groups[0]: fault}
    halves = [groups[: len(groups) // 2], groups[len(groups) // 2 :]]
    found: dict[Group, str] = {}
    for half in halves:
        found |= failing_groups(program, {group: chosen[group] for group in half}, limit)
    if not found:
        found = dict.fromkeys(halves[1], f"it cannot be removed together with others: {fault}")
    return found


def _fault(program: Program, chosen: Mapping[Group, Sequence[int]], limit: float) -> str | None:
    """What is wrong with removing these units; None if nothing is."""
    exact = {group: units for group, units in chosen.items() if not group.mixed_by}
    try:
        remove_units(program.copy(), chosen)
        error = verify_removal(program, exact).error if exact else None
    except (FxpruneError, RuntimeError, TypeError, ValueError, LookupError) as fault:
        return f"removing units fails ({type(fault).__name__}: {str(fault).splitlines()[0]})"
    if error is not None and not error <= limit:
        return f"removing units changes the output by {error:.1e} of its size (limit {limit:g})"
    return None
