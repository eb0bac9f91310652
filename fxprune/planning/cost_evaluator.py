"""A ledger of costs while groups shrink: many candidate cuts at once, exactly."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fxprune.planning.budget import Quantity
from fxprune.planning.cost_model import CostModel
from fxprune.structure.merging import Ints

Floats = NDArray[np.float64]


class Costs(Protocol):
    """Costs as functions of how many units each group has lost."""

    @property
    def quantities(self) -> tuple[Quantity, ...]:
        """What the columns of the answers are."""

    def values(self, removed: Ints) -> Floats:
        """Return the costs of several cuts: (cuts, groups) -> (cuts, quantities)."""

    def changes(self, removed: Ints, groups: Ints, counts: Ints) -> Floats:
        """Return by how much costs change if one group alone is set to another count.

        Args:
            removed: the cut to start from, (groups,).
            groups: for each candidate, the number of the group that it changes.
            counts: for each candidate, how many units that group has lost then.

        Returns:
            (candidates, quantities), negative where the candidate saves.

        """


@dataclass(frozen=True, eq=False)
class Ledger:
    """The closed form of a program's costs, arranged for changes of one group at a time.

    Attributes:
        quantities: what is counted.
        sizes: for each distinct dimension, its size.
        shrink: (dimensions, groups): by how much one unit of a group shrinks a dimension.
        factors: for each product of dimensions, its constant.
        members: (products, dimensions per product): which dimensions it multiplies.
        weights: (products, quantities): one where the product counts towards the quantity.

    """

    quantities: tuple[Quantity, ...]
    sizes: Floats
    shrink: Floats
    factors: Floats
    members: Ints
    weights: Floats

    @classmethod
    def of(cls, model: CostModel, quantities: Sequence[Quantity]) -> Ledger:
        """Arrange a cost model, adding up the products of equal dimensions."""
        rows, factors, kinds = [], [], []
        members = np.sort(model.members, axis=1)
        for number, name in enumerate(quantities):
            chosen = model.rows[name]  # type: ignore[index]  # latency has a ledger of its own
            distinct, inverse = np.unique(members[chosen], axis=0, return_inverse=True)
            rows.append(distinct)
            factors.append(np.bincount(inverse.reshape(-1), model.factors[chosen], len(distinct)))
            kinds.append(np.full(len(distinct), number))
        weights = np.eye(len(quantities))[np.concatenate(kinds)]
        return cls(
            tuple(quantities), model.sizes, model.shrink,
            np.concatenate(factors), np.concatenate(rows), weights,
        )  # fmt: skip

    def values(self, removed: Ints | Floats) -> Floats:
        """Return the costs of several cuts: (cuts, groups) -> (cuts, quantities)."""
        left = self.sizes - removed @ self.shrink.T
        products: Floats = self.factors * left[:, self.members].prod(axis=2)
        return products @ self.weights

    @functools.cached_property
    def _touched(self) -> tuple[Ints, Ints]:
        """The products that each group changes: where its run starts, and the runs."""
        touches = (self.shrink[self.members] != 0).any(axis=1)  # products, groups
        group, product = np.nonzero(touches.T)
        return np.searchsorted(group, np.arange(self.shrink.shape[1] + 1)), product

    def changes(self, removed: Ints, groups: Ints, counts: Ints) -> Floats:
        """Return by how much costs change if one group alone is set to another count."""
        starts, products = self._touched
        lengths = starts[groups + 1] - starts[groups]
        candidate = np.repeat(np.arange(len(groups)), lengths)
        ends = np.cumsum(lengths)
        within = np.arange(len(candidate)) - np.repeat(ends - lengths, lengths)
        product = products[starts[groups][candidate] + within]
        left = (self.sizes - self.shrink @ removed)[self.members[product]]
        slope = self.shrink[self.members[product], groups[candidate, None]]
        after = left - slope * (counts - removed[groups])[candidate, None]
        change = self.factors[product] * (after.prod(axis=1) - left.prod(axis=1))
        totals = np.zeros((len(groups), len(self.quantities)))
        np.add.at(totals, candidate, change[:, None] * self.weights[product])
        return totals


@dataclass(frozen=True, eq=False)
class Ledgers:
    """Several ledgers side by side."""

    parts: tuple[Costs, ...]

    @property
    def quantities(self) -> tuple[Quantity, ...]:
        """What the columns of the answers are."""
        return tuple(name for part in self.parts for name in part.quantities)

    def values(self, removed: Ints) -> Floats:
        """Return the costs of several cuts: (cuts, groups) -> (cuts, quantities)."""
        return np.concatenate([part.values(removed) for part in self.parts], axis=1)

    def changes(self, removed: Ints, groups: Ints, counts: Ints) -> Floats:
        """Return by how much costs change if one group alone is set to another count."""
        found = [part.changes(removed, groups, counts) for part in self.parts]
        return np.concatenate(found, axis=1)
