"""Costs of cuts with implants, in closed form: columns for what implants add and save."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fxprune.graph.cost import batch_of
from fxprune.graph.facts import Slot
from fxprune.graph.program import Program, shape_of
from fxprune.implants.implant_types import Site
from fxprune.planning.budget import Quantity
from fxprune.planning.cost_evaluator import Costs, Floats, Ledger
from fxprune.planning.cost_model import CostModel
from fxprune.structure.merging import Ints

Product = tuple[float, tuple[int, ...]]
CHUNK = 256  # cuts at a time


class Widening:
    """A cost model that gets more columns: dimensions that grow with counts, and products of them.

    Args:
        model: the costs of removal, one column per group.
        columns: how many columns there are in the end; the first are those of the model.

    """

    def __init__(self, model: CostModel, columns: int) -> None:
        self._old, self._columns = model, columns
        self._sizes, self._factors = list(model.sizes), list(model.factors)
        rest = np.zeros((len(model.sizes), columns - len(model.groups)))
        self._shrink = list(np.concatenate([model.shrink, rest], axis=1))
        self._members: list[tuple[int, ...]] = []
        self._kinds: list[str] = []

    def count(self, column: int, each: int = 1) -> int:
        """Return a dimension that is as large as a column's count, times a constant."""
        shrink = np.zeros(self._columns)
        shrink[column] = -each
        return self._dimension(0.0, shrink)

    def slot(self, slot: Slot, size: int) -> int:
        """Return the dimension of a tensor, which shrinks as groups lose units."""
        shrink = np.zeros(self._columns)
        for number, group in enumerate(self._old.groups):
            if slot in group.slots:
                shrink[number] = group.multiplicity(slot)
        return self._dimension(float(size), shrink)

    def _dimension(self, size: float, shrink: Floats) -> int:
        self._sizes.append(size)
        self._shrink.append(shrink)
        return len(self._sizes) - 1

    def add(
        self, program: Program, site: Site, products: Sequence[Product], bias: tuple[int, ...]
    ) -> None:
        """Add products that count per position to all quantities.

        Args:
            program: whose layer it is.
            site: the layer.
            products: constants, and the dimensions that each multiplies.
            bias: the dimensions whose product is the number of biases of implants.

        """
        shape = shape_of(site.node)
        positions = math.prod(shape) / shape[site.channel_dim] / batch_of(program)
        size = program.tensor(site.weight).element_size()
        biases: list[Product] = [(1.0, bias)] if site.bias is None else []
        for name, each, more in (
            ("macs", positions, []), ("params", 1.0, biases), ("weight_bytes", size, biases)
        ):  # fmt: skip
            for factor, members in [*products, *more]:
                self._factors.append(each * factor)
                self._members.append(members)
                self._kinds.append(name)

    def model(self) -> CostModel:
        """Return the widened model."""
        old = self._old
        filler = len(old.sizes) - 1
        width = max([old.members.shape[1], *map(len, self._members)])
        members = np.full((len(old.members) + len(self._members), width), filler, dtype=np.int64)
        members[: len(old.members), : old.members.shape[1]] = old.members
        for row, dims in enumerate(self._members, start=len(old.members)):
            members[row, : len(dims)] = dims
        kinds = np.array(self._kinds, dtype=str)
        rows = {name: np.concatenate([mask, kinds == name]) for name, mask in old.rows.items()}
        return CostModel(
            old.groups, np.array(self._sizes), np.stack(self._shrink), np.array(self._factors),
            members, rows,
        )  # fmt: skip


def in_chunks(ledger: Ledger, cuts: Floats) -> Floats:
    """Return the ledger's values without holding all products at once."""
    parts = [ledger.values(cuts[start : start + CHUNK]) for start in range(0, len(cuts), CHUNK)]
    return np.concatenate(parts or [np.zeros((0, len(ledger.quantities)))])


@dataclass(frozen=True, eq=False)
class ChoiceCosts(Costs):
    """Costs where a cut is, per group, the number of a choice from a table.

    Attributes:
        ledger: over all columns.
        tables: for each number of a cut, (choices, columns): what each choice comes to.
        columns: for each number of a cut, which columns of the ledger these are.

    """

    ledger: Ledger
    tables: tuple[Floats, ...]
    columns: tuple[Ints, ...]

    @property
    def quantities(self) -> tuple[Quantity, ...]:
        """What the columns of the answers are."""
        return self.ledger.quantities

    def values(self, removed: Ints) -> Floats:
        """Return the costs of several cuts: (cuts, groups) -> (cuts, quantities)."""
        return in_chunks(self.ledger, self._counts(removed))

    def changes(self, removed: Ints, groups: Ints, counts: Ints) -> Floats:
        """Return by how much costs change if one group alone is set to another choice."""
        ledger, found = self.ledger, np.zeros((len(groups), len(self.ledger.quantities)))
        left = ledger.sizes - ledger.shrink @ self._counts(removed[None])[0]
        for number in np.unique(groups).tolist():
            rows, table = np.flatnonzero(groups == number), self.tables[number]
            products, columns = self._touched[number], self.columns[number]
            members = ledger.members[products]
            steps = table[counts[rows]] - table[removed[number]]
            after = left - steps @ ledger.shrink[:, columns].T  # candidates, dimensions
            change = after[:, members].prod(axis=2) - left[members].prod(axis=1)
            found[rows] = (ledger.factors[products] * change) @ ledger.weights[products]
        return found

    @functools.cached_property
    def _touched(self) -> tuple[Ints, ...]:
        """For each number of a cut, the products that it changes."""
        touches = (self.ledger.shrink != 0)[self.ledger.members].any(axis=1)  # products, columns
        return tuple(np.flatnonzero(touches[:, columns].any(axis=1)) for columns in self.columns)

    def _counts(self, cuts: Ints) -> Floats:
        found = np.zeros((len(cuts), self.ledger.shrink.shape[1]))
        for number, (table, columns) in enumerate(zip(self.tables, self.columns, strict=True)):
            found[:, columns] = table[cuts[:, number]]
        return found
