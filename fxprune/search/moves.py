"""Moves: what can be removed from a program in one step of the search."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fxprune.graph.facts import Preference, Sensitivity, Slot
from fxprune.graph.program import Program
from fxprune.planning.ranking import cheapest_first
from fxprune.planning.widths import Rounding, widths
from fxprune.search.plan import NetworkPlan, branch_id
from fxprune.structure.branches import find_branches, remove_branch
from fxprune.structure.groups import Group, find_groups
from fxprune.structure.merging import Ints
from fxprune.structure.removal import remove_units

LEVELS = (0.75, 0.5)  # besides the next width, what may remain of a group in one step
MAX_RATIO = 0.9  # of its units that a group may lose in all


@dataclass(frozen=True)
class Move:
    """One removal.

    Attributes:
        kind: a whole residual branch, or units of a group.
        name: of the branch, or of the group of the dense program.
        units: how many units of the group remain.

    """

    kind: Literal["branch", "width"]
    name: str
    units: int = 0

    def __str__(self) -> str:
        return self.name if self.kind == "branch" else f"{self.name} to {self.units} units"


class Ranking:
    """The removable groups of a dense program, and the order in which their units are removed.

    Args:
        dense: the program.
        sensitivity: scores of its units.
        rounding: what widths are multiples of.

    """

    def __init__(self, dense: Program, sensitivity: Sensitivity, rounding: Rounding) -> None:
        self.attention: Preference = sensitivity.attention
        scored = sensitivity.scores
        groups = [
            group
            for group in find_groups(dense, self.attention)
            if group.frozen_because is None and group.name in scored
        ]
        self._owner: dict[Slot, str] = {
            slot: group.name for group in groups for slot in group.slots
        }
        self._order = {group.name: cheapest_first(sensitivity, group) for group in groups}
        self._kept = {
            group.name: len(group.units) - width.choices(rounding, 1, MAX_RATIO, None)
            for group, width in zip(groups, widths(dense, groups), strict=True)
        }

    def current(self, program: Program) -> dict[str, Group]:
        """Return what is left of the dense groups in a smaller program, by their dense names."""
        found = {}
        for group in find_groups(program, self.attention):
            owners = {self._owner[slot] for slot in group.slots if slot in self._owner}
            if group.frozen_because is None and len(owners) == 1:
                found[owners.pop()] = group
        return found

    def levels(self, name: str, units: int) -> tuple[int, ...]:
        """Return the smaller widths of a group that one step may lead to: the next, and coarser."""
        smaller = self._kept[name][self._kept[name] < units]  # descending
        coarse = [smaller[smaller <= share * units][:1] for share in LEVELS]
        return tuple(dict.fromkeys(np.concatenate([smaller[:1], *coarse]).tolist()))

    def removed(self, name: str, units: int) -> tuple[int, ...]:
        """Return the dense numbers of the units that are gone where so many remain."""
        order = self._order[name]
        return tuple(sorted(order[: len(order) - units].tolist()))

    def next_removed(self, name: str, now: int, units: int) -> list[int]:
        """Return which of the units that a smaller program still has are removed next."""
        order: Ints = self._order[name]
        remaining = order[len(order) - now :]
        numbers = np.searchsorted(np.sort(remaining), remaining[: now - units])
        return sorted(numbers.tolist())


def moves(program: Program, ranking: Ranking) -> Iterator[Move]:
    """Yield what can be removed from a program next."""
    for branch in find_branches(program):
        yield Move("branch", branch_id(branch))
    for name, group in ranking.current(program).items():
        for units in ranking.levels(name, len(group.units)):
            yield Move("width", name, units)


def moved(program: Program, move: Move, ranking: Ranking) -> Program:
    """Return a copy of a program, sharing tensors, after a move."""
    small = program.copy(share=True)
    if move.kind == "branch":
        branches = {branch_id(branch): branch for branch in find_branches(small)}
        remove_branch(small, branches[move.name])
    else:
        group = ranking.current(small)[move.name]
        gone = ranking.next_removed(move.name, len(group.units), move.units)
        remove_units(small, {group: gone})
    return small


def plan_of(done: Sequence[Move], ranking: Ranking) -> NetworkPlan:
    """Return the plan that makes several moves of the dense program at once."""
    branches = tuple(move.name for move in done if move.kind == "branch")
    widths = {move.name: move.units for move in done if move.kind == "width"}  # the last counts
    units = {name: ranking.removed(name, left) for name, left in widths.items()}
    return NetworkPlan(branches, units, ranking.attention)
