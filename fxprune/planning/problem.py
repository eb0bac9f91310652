"""Cuts: what a budget problem is, and the candidate cuts around a given one."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fxprune.planning.cost_evaluator import Costs, Floats
from fxprune.structure.merging import Ints


@dataclass(frozen=True, eq=False)
class Changes:
    """Candidates that each set one group of a cut to another count.

    Attributes:
        groups: the group that each changes.
        counts: how many units that group has lost then.
        values: by how much each changes the costs, (candidates, quantities).
        losses: by how much each changes the sensitivity spent.

    """

    groups: Ints
    counts: Ints
    values: Floats
    losses: Floats

    def where(self, chosen: NDArray[np.bool_]) -> Changes:
        """Return some of the changes."""
        return Changes(
            self.groups[chosen], self.counts[chosen], self.values[chosen], self.losses[chosen]
        )

    def apply(self, removed: Ints, number: int) -> Ints:
        """Return a cut with one of the changes made."""
        cut = removed.copy()
        cut[self.groups[number]] = self.counts[number]
        return cut


@dataclass(frozen=True, eq=False)
class Problem:
    """Costs, limits, and what each group may lose at what sensitivity.

    A cut is one number per group: how many units it loses.

    Attributes:
        names: the groups, for messages.
        costs: the costs of every cut.
        limits: for each quantity of the costs, its largest value.
        losses: for each group, the sensitivity spent by number of units lost, from zero to all
            but one.
        levels: for each rounding, from the one in force to the finest, and for each group, the
            numbers of units that it may lose, ascending.
        labels: what each rounding is called in notes.
        tolerance: how far below its limit the binding quantity may end, as a fraction.
        units: for each group, how many units go by count, and how many there are, where counts
            number choices instead of units; None where they are units.

    """

    names: tuple[str, ...]
    costs: Costs
    limits: Floats
    losses: tuple[Floats, ...]
    levels: tuple[tuple[Ints, ...], ...]
    labels: tuple[str, ...]
    tolerance: float = 0.01
    units: tuple[tuple[Ints, int], ...] | None = None

    @functools.cached_property
    def sizes(self) -> Ints:
        """How many units each group has."""
        return np.array([len(loss) for loss in self.losses], dtype=np.int64)

    @functools.cached_property
    def _starts(self) -> Ints:
        return np.concatenate([[0], np.cumsum(self.sizes)[:-1]]).astype(np.int64)

    @functools.cached_property
    def _flat(self) -> Floats:
        return np.concatenate(self.losses)

    @functools.cached_property
    def _neighbours(self) -> list[tuple[Ints, Ints]]:
        """By rounding, for each group and count, the counts allowed around it, or -1."""
        tables = []
        for levels in self.levels:
            lower, higher = [], []
            for level, size in zip(levels, self.sizes, strict=True):
                counts = np.arange(size)
                lower.append(np.append(level, -1)[np.searchsorted(level, counts) - 1])
                higher.append(np.append(level, -1)[np.searchsorted(level, counts, side="right")])
            tables.append((np.concatenate(lower), np.concatenate(higher)))
        return tables

    def left(self, group: int, count: int) -> tuple[int, int]:
        """Return how many units a group keeps at a count, and how many it has."""
        if self.units is None:
            return int(self.sizes[group]) - count, int(self.sizes[group])
        removed, total = self.units[group]
        return total - int(removed[count]), total

    def least(self) -> Ints:
        """Return the cut that removes as little as is allowed."""
        return np.array([level[0] for level in self.levels[0]], dtype=np.int64)

    def most(self) -> Ints:
        """Return the cut that removes as much as any rounding allows."""
        return np.array([level[-1] for level in self.levels[-1]], dtype=np.int64)

    def steps(self, rounding: int, removed: Ints, *, back: bool = False) -> Changes:
        """Return for each group that has one the step to its next width, or back from it."""
        narrower, wider = self._neighbours[rounding][::-1]
        counts = (wider if back else narrower)[self._starts + removed]
        groups = np.flatnonzero(counts >= 0)
        return self.changes(removed, groups, counts[groups])

    def widths(self, rounding: int, removed: Ints, reach: int | None = None) -> Changes:
        """Return the changes of one group to any other width.

        Args:
            rounding: the number of the rounding that the widths keep.
            removed: the cut to start from.
            reach: how many widths away the other may be; None for any.

        """
        groups, counts = [], []
        for number, level in enumerate(self.levels[rounding]):
            here = removed[number]
            if reach is not None:
                first, last = np.searchsorted(level, [here, here + 1])
                level = level[max(first - reach, 0) : last + reach]
            level = level[level != here]
            groups.append(np.full(len(level), number, dtype=np.int64))
            counts.append(level)
        return self.changes(removed, np.concatenate(groups), np.concatenate(counts))

    def changes(self, removed: Ints, groups: Ints, counts: Ints) -> Changes:
        """Return what setting one group at a time to another count does to a cut."""
        spent = self.loss(groups, counts) - self.loss(groups, removed[groups])
        return Changes(groups, counts, self.costs.changes(removed, groups, counts), spent)

    def loss(self, groups: Ints, counts: Ints) -> Floats:
        """Return the sensitivity that each group spends at its count."""
        spent: Floats = self._flat[self._starts[groups] + counts]
        return spent

    def total(self, removed: Ints) -> float:
        """Return the sensitivity that a cut spends."""
        return float(self._flat[self._starts + removed].sum())

    def value(self, removed: Ints) -> Floats:
        """Return the costs of one cut."""
        costs: Floats = self.costs.values(removed[None])[0]
        return costs

    def lands(self, values: Floats) -> NDArray[np.bool_]:
        """Tell which costs are within all limits and use one of them up: (..., quantities)."""
        share = values / self.limits
        return np.asarray((share <= 1).all(axis=-1) & (share >= 1 - self.tolerance).any(axis=-1))
