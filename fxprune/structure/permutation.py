"""Reordering units: every slot that a group occupies is permuted alike, which changes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fxprune.errors import InputError
from fxprune.graph.facts import REMOVED, Removed
from fxprune.graph.program import Program
from fxprune.graph.surgery import set_tensor
from fxprune.structure.groups import Analysis, Group, analyse
from fxprune.structure.labels import DimLabels, Labels
from fxprune.structure.merging import Ints

Orders = Mapping[Group, Sequence[int]]


def permute_units(program: Program, orders: Orders) -> None:
    """Reorder the units of groups, in place: unit ``order[i]`` comes to where unit ``i`` was.

    The fact of what removal left follows, so that the dense values stay comparable.

    Args:
        program: the program that the groups were found in, unchanged since.
        orders: by group, all numbers of its units in the new order.

    Raises:
        InputError: a group is frozen or not of this program, an order is no permutation, or a
            value holds some of the group's units only, so that their order matters.

    """
    if not orders:
        return
    analysis = analyse(program, next(iter(orders)).preference)
    unit, owner, tables = _numbered(analysis, orders)
    moves: dict[str, dict[int, Tensor]] = {}
    for node, value in analysis.flow.values.items():
        for labels in value if isinstance(value, list) else [value]:
            for entry in labels.entries if isinstance(labels, Labels) else ():
                indices = _moved(entry, analysis.component, (unit, owner, tables))
                if indices is not None:
                    moves.setdefault(node.name, {})[entry.dim] = indices
    _apply(program, moves)
    program.refresh()


def _numbered(analysis: Analysis, orders: Orders) -> tuple[Ints, Ints, list[tuple[str, Ints]]]:
    """By component, the number of its unit and of its group; by group, its name and order."""
    found = {group.name: group for group in analysis.groups}
    unit = np.full(len(analysis.component), -1, dtype=np.int64)
    owner, tables = unit.copy(), []
    for number, (group, order) in enumerate(orders.items()):
        current = found.get(group.name)
        if group.frozen_because is not None:
            raise InputError(f"group {group.name} is frozen: {group.frozen_because}")
        if current is None or len(current.units) != len(group.units):
            raise InputError(f"group {group.name} does not belong to the current program")
        if sorted(order) != list(range(len(group.units))):
            raise InputError(f"the new order of group {group.name} must name every unit once")
        unit[current.components] = np.arange(len(group.units))
        owner[current.components] = number
        tables.append((group.name, np.asarray(order, dtype=np.int64)))
    return unit, owner, tables


def _moved(
    entry: DimLabels, component: Ints, numbers: tuple[Ints, Ints, list[tuple[str, Ints]]]
) -> Tensor | None:
    """Which old index comes to each new one; None where none of the units is."""
    unit, owner, tables = numbers
    ids = entry.ids.numpy()
    components = component[ids]
    owners = np.where(ids == 0, -1, owner[components])
    if (owners < 0).all():
        return None
    indices = np.arange(len(ids))
    for number in np.unique(owners[owners >= 0]).tolist():
        name, order = tables[number]
        places = np.flatnonzero(owners == number)
        counts = np.bincount(unit[components[places]], minlength=len(order))
        if len(set(counts.tolist())) > 1:
            raise InputError(
                f"units of group {name} are used in different ways, so their order matters"
            )
        by_unit = places[np.argsort(unit[components[places]], kind="stable")]
        table = by_unit.reshape(len(order), -1)
        indices[table] = table[order]
    return torch.from_numpy(indices)


def _apply(program: Program, moves: Mapping[str, Mapping[int, Tensor]]) -> None:
    earlier = program.facts.get(REMOVED.name)
    kept = {name: dict(dims) for name, dims in earlier.kept.items()} if earlier else {}
    done: set[int] = set()
    for node in list(program.graph.nodes):
        for dim, indices in moves.get(node.name, {}).items():
            before = kept.setdefault(node.name, {}).get(dim, torch.arange(len(indices)))
            kept[node.name][dim] = before[indices]
        if node.op != "get_attr" or node.name not in moves:
            continue
        name = str(node.target)
        value = program.tensor(name)
        if id(value) in done:
            continue
        for dim, indices in moves[node.name].items():
            value = value.detach().index_select(dim, indices.to(value.device))
        set_tensor(program, name, value)
        done.add(id(program.tensor(name)))
    program.put(REMOVED, Removed(kept))
